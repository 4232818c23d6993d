//! Unit tests of the memory table, and tables over fresh files for others.

use super::*;

/// A table over fresh files, for the unit tests of this crate. Each entry
/// is (guest address, length); user address = guest address + 2^40.
pub(crate) fn table(regions: &[(u64, u64)]) -> GuestMemory {
    let (layouts, files) = regions
        .iter()
        .map(|&(guest, len)| {
            let file = tempfile::tempfile().expect("temp file");
            file.set_len(len).expect("size");
            (RegionLayout { guest, len, user: guest + (1 << 40), offset: 0 }, file)
        })
        .unzip::<_, _, Vec<_>, Vec<_>>();
    GuestMemory::map(&layouts, files).expect("map")
}

#[test]
fn a_range_may_cross_regions_but_not_a_hole() {
    let mem = table(&[(0x1000, 0x1000), (0x2000, 0x1000), (0x8000, 0x1000)]);
    let mut hint = RegionHint::default();
    let mut spans = Vec::new();
    mem.translate(0x1800, 0x1000, &mut hint, |s| spans.push(s.len())).expect("both regions");
    assert_eq!(spans, [0x800, 0x800]);
    assert_eq!(mem.translate(0x2f00, 0x200, &mut hint, |_| ()), Err(Unmapped(0x3000)));
    assert_eq!(mem.translate(u64::MAX, 2, &mut hint, |_| ()), Err(Unmapped(u64::MAX)));
}

#[test]
fn bytes_written_are_read_back_across_a_boundary() {
    let mem = table(&[(0, 0x1000), (0x1000, 0x1000)]);
    let mut hint = RegionHint::default();
    mem.write(0xffe, &[1, 2, 3, 4], &mut hint).expect("write");
    let mut back = [0; 4];
    mem.read(0xffe, &mut back, &mut hint).expect("read");
    assert_eq!(back, [1, 2, 3, 4]);
}

#[test]
fn a_bad_table_is_refused_with_its_reason() {
    let file = || tempfile::tempfile().expect("temp file");
    let one = |guest, len| [RegionLayout { guest, len, user: 0, offset: 0 }];
    assert!(matches!(GuestMemory::map(&one(0, 4096), vec![file()]), Err(MemoryError::FileTooSmall { .. })));
    assert!(matches!(GuestMemory::map(&one(u64::MAX, 2), vec![file()]), Err(MemoryError::BadRange(_))));
    assert!(matches!(GuestMemory::map(&one(0, 0), vec![file()]), Err(MemoryError::BadRange(_))));
    // A character device is as good as a file if it can be mapped.
    let null = File::open("/dev/null").expect("null");
    assert!(matches!(GuestMemory::map(&one(0, 1), vec![null]), Err(MemoryError::Map { .. })));
    let folder = File::open("/").expect("a folder");
    assert!(matches!(GuestMemory::map(&one(0, 1), vec![folder]), Err(MemoryError::NotAFile(0))));
    let full = file();
    full.set_len(8192).expect("size");
    let mem = table(&[(0x1000, 0x1000)]);
    let over = RegionLayout { guest: 0x800, len: 0x1000, user: 0, offset: 0 };
    assert!(matches!(mem.with(over, &full), Err(MemoryError::Overlap(0x800))));
}

#[test]
fn a_removed_region_is_gone_from_the_new_table_only() {
    let mem = table(&[(0, 0x1000), (0x1000, 0x1000)]);
    let less = mem.without(0x1000, 0x1000 + (1 << 40), 0x1000).expect("there");
    let mut hint = RegionHint::default();
    assert!(mem.translate(0x1800, 1, &mut hint, |_| ()).is_ok(), "and the hint is of that region");
    assert_eq!(less.translate(0x1000, 1, &mut hint, |_| ()), Err(Unmapped(0x1000)));
    assert!(mem.translate(0x1000, 1, &mut hint, |_| ()).is_ok());
    assert!(mem.without(0x1000, 0, 0x1000).is_err());
}

/// The kernel maps from the top down: of regions that are mapped one after
/// another, the later one often ends where the earlier one starts.
#[test]
fn a_span_over_two_mappings_is_copied_whole() {
    const LEN: u64 = 1 << 20;
    let mut kept = Vec::new();
    let found = (0..100).find_map(|_| {
        let mem = table(&[(LEN, LEN), (0, LEN)]);
        let mut spans = Vec::new();
        mem.translate(LEN - 100, 300, &mut RegionHint::default(), |s| spans.push(s)).expect("mapped");
        let [first, second] = spans[..] else { panic!("two regions") };
        let adjacent = first.end() == second.addr();
        let span = HostSpan::new(first.addr(), first.len() + second.len());
        if adjacent {
            Some((mem, span))
        } else {
            kept.push(mem);
            None
        }
    });
    let (mem, span) = found.expect("no two mappings side by side in a hundred tries");
    let data: Vec<u8> = (0..300).map(|i| u8::try_from(i % 251).expect("small")).collect();
    assert!(mem.write_span(span, &data));
    let mut back = [0; 300];
    mem.read(LEN - 100, &mut back, &mut RegionHint::default()).expect("mapped");
    assert_eq!(back.as_slice(), data);
    back.fill(0);
    assert!(mem.read_span(span, &mut back));
    assert_eq!(back.as_slice(), data);
}

#[test]
fn a_span_of_another_table_is_never_touched() {
    let (a, b) = (table(&[(0, 0x1000)]), table(&[(0, 0x1000)]));
    let mut span = HostSpan::new(0, 0);
    a.translate(0, 16, &mut RegionHint::default(), |s| span = s).expect("mapped");
    let mut out = [7; 16];
    assert!(!b.read_span(span, &mut out) && !b.write_span(span, &[1; 16]));
    assert_eq!(out, [7; 16]);
}
