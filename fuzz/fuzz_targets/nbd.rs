#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::targets::nbd::run(data));
