//! What a session should be after the messages that it carried out, as a plain reading of the vhost-user document says.
//!
//! What it is: [`Model`], which says before a memory table is sent whether it must be taken, and after each message which
//! queues run.
//!
//! What it is not: it does not judge all that may be wrong with a message; what it does not know it takes as it came.

use serde_json::Value;
use vublk::link::Queue;

use super::super::hostile::{Hostile, Message, Region};
use super::super::stage::QUEUES;
use crate::support::frontend::{NO_FD, feature, msg, protocol};

#[derive(Clone, Copy, Debug, Default)]
struct Ring {
    size: u32,
    /// Of its descriptors, its available and its used part, as the front-end names them.
    addresses: Option<[u64; 3]>,
    kick: bool,
    enabled: bool,
    /// A message came about it since the driver's features changed: that is when it is started.
    settled: bool,
}

/// See the head of the file.
#[derive(Debug)]
pub struct Model {
    features: u64,
    protocol: u64,
    regions: Vec<Region>,
    rings: [Ring; QUEUES as usize],
    has_inflight: bool,
    has_log: bool,
}

fn word(payload: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(payload[at..at + 4].try_into().unwrap())
}

fn long(payload: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(payload[at..at + 8].try_into().unwrap())
}

/// The regions of a SET_MEM_TABLE that announces as many as it has, and brings a descriptor for each.
fn table(message: &Message) -> Option<Vec<Region>> {
    let (head, regions) = message.payload().split_at_checked(8)?;
    let whole = word(head, 4) == 0
        && regions.len() == 32 * message.fds.len()
        && u64::from(word(head, 0)) == message.fds.len() as u64;
    whole.then(|| regions.chunks(32).map(Region::parse).collect())
}

/// The region of an ADD_MEM_REG or a REM_MEM_REG of the right size.
fn single(message: &Message) -> Option<Region> {
    (message.payload().len() == 40).then(|| Region::parse(&message.payload()[8..]))
}

fn share_a_byte(one: &Region, other: &Region) -> bool {
    one.guest < other.guest + other.len && other.guest < one.guest + one.len
}

impl Model {
    pub fn new() -> Self {
        let rings = [Ring { settled: true, ..Ring::default() }; QUEUES as usize];
        Self { features: 0, protocol: 0, regions: Vec::new(), rings, has_inflight: false, has_log: false }
    }

    /// Whether a message about memory must be carried out. `None`: that is not known.
    pub fn expects(&self, message: &Message, hostile: &Hostile) -> Option<bool> {
        if message.flags() & !(1 << 3) != 1 {
            return Some(false); // no request of version 1
        }
        let slots = self.protocol & protocol::CONFIGURE_MEM_SLOTS != 0;
        match message.request {
            msg::SET_MEM_TABLE => {
                let Some(regions) = table(message).filter(|regions| (1..=8).contains(&regions.len())) else {
                    return Some(false);
                };
                self.fit(&[], &regions, &message.fds, hostile)
            }
            msg::ADD_MEM_REG => match single(message).filter(|_| slots && message.fds.len() == 1) {
                Some(region) => self.fit(&self.regions, &[region], &message.fds, hostile),
                None => Some(false),
            },
            msg::REM_MEM_REG if message.fds.is_empty() => {
                let known = single(message).filter(|region| slots && self.position(region).is_some());
                if self.has_log { known.is_none().then_some(false) } else { Some(known.is_some()) }
            }
            _ => None,
        }
    }

    /// Whether these regions can join those that are there.
    fn fit(&self, there: &[Region], new: &[Region], fds: &[usize], hostile: &Hostile) -> Option<bool> {
        let mut all = there.to_vec();
        for (region, &fd) in new.iter().zip(fds) {
            let Region { guest, len, user, offset } = *region;
            let ends = [guest, user, offset].map(|start| start.checked_add(len));
            let [Some(_), Some(_), Some(end)] = ends else { return Some(false) };
            if len == 0 || all.iter().any(|other| share_a_byte(region, other)) {
                return Some(false);
            }
            // A device that takes the place of the file knows itself what it can map.
            if hostile.file_bytes(fd)? < end {
                return Some(false);
            }
            all.push(*region);
        }
        // The dirty log may be too small for them.
        if self.has_log { None } else { Some(true) }
    }

    /// REM_MEM_REG names a region by all but its offset.
    fn position(&self, region: &Region) -> Option<usize> {
        self.regions.iter().position(|r| Region { offset: 0, ..*r } == Region { offset: 0, ..*region })
    }

    /// A message was carried out.
    pub fn took(&mut self, message: &Message) {
        let payload = message.payload();
        let mut all_settle = false;
        match message.request {
            msg::SET_FEATURES => {
                self.features = long(payload, 0);
                let all_enabled = self.features & feature::PROTOCOL_FEATURES == 0;
                for ring in &mut self.rings {
                    ring.enabled |= all_enabled;
                    ring.settled = all_enabled;
                }
            }
            msg::SET_PROTOCOL_FEATURES => self.protocol = long(payload, 0),
            msg::SET_MEM_TABLE => {
                self.regions = payload[8..].chunks(32).map(Region::parse).collect();
                all_settle = true;
            }
            msg::ADD_MEM_REG => {
                self.regions.push(Region::parse(&payload[8..]));
                all_settle = true;
            }
            msg::REM_MEM_REG => {
                let at = self.position(&Region::parse(&payload[8..])).expect("one that is there");
                self.regions.remove(at);
                all_settle = true;
            }
            msg::RESET_DEVICE => self.rings = Self::new().rings,
            msg::SET_INFLIGHT_FD => self.has_inflight = true,
            msg::SET_LOG_BASE => self.has_log = true,
            msg::SET_VRING_NUM
            | msg::SET_VRING_BASE
            | msg::GET_VRING_BASE
            | msg::SET_VRING_ADDR
            | msg::SET_VRING_ENABLE => {
                let ring = &mut self.rings[word(payload, 0) as usize];
                match message.request {
                    msg::SET_VRING_NUM => ring.size = word(payload, 4),
                    msg::GET_VRING_BASE => ring.kick = false,
                    msg::SET_VRING_ENABLE => {
                        ring.enabled = word(payload, 4) == 1;
                        ring.settled = true;
                    }
                    msg::SET_VRING_ADDR => {
                        ring.addresses = Some([long(payload, 8), long(payload, 24), long(payload, 16)]);
                    }
                    _ => {}
                }
            }
            msg::SET_VRING_KICK => {
                let number = long(payload, 0);
                self.rings[number as usize & 0xff].kick = number & NO_FD == 0;
            }
            _ => {}
        }
        if all_settle {
            self.rings.iter_mut().for_each(|ring| ring.settled = true);
        }
    }

    /// Whether `[at, at + len)` of the front-end's addresses is in one region, and where in its file.
    /// Whether a part of a ring is there, and surely so: a front-end may have one range of its addresses in two regions.
    fn has(&self, at: u64, len: u64, align: u64) -> (bool, bool) {
        let holds = |region: &&Region| {
            at >= region.user && at - region.user <= region.len && region.len - (at - region.user) >= len
        };
        let fits = |region: &Region| (at - region.user + region.offset).is_multiple_of(align);
        let may = self.regions.iter().filter(holds).any(fits);
        (may, may && self.regions.iter().filter(holds).all(fits))
    }

    /// Whether all that a queue needs is there, and surely so.
    fn can_run(&self, ring: &Ring) -> (bool, bool) {
        let Some([desc, avail, used]) = ring.addresses else { return (false, false) };
        let size = u64::from(ring.size);
        if !ring.kick || !ring.enabled || !size.is_power_of_two() || size > 1024 {
            return (false, false);
        }
        let parts = [
            self.has(desc, 16 * size, 16),
            self.has(avail, 6 + 2 * size, 2),
            self.has(used, 6 + 8 * size, 4),
        ];
        (parts.iter().all(|(may, _)| *may), parts.iter().all(|(_, surely)| *surely))
    }

    /// Those queues run of which all that a queue needs is there.
    pub fn check_queues(&self, queues: &[Queue]) {
        for (index, ring) in self.rings.iter().enumerate() {
            let (can, surely) = self.can_run(ring);
            if let Some(running) = queues.iter().find(|running| running.index == index) {
                assert!(can, "queue {index} runs: {self:?}");
                assert_eq!(running.size, ring.size);
            } else if ring.settled && self.features & feature::VERSION_1 != 0 && !self.has_inflight {
                // An in-flight region may have no place for the queue.
                assert!(!surely, "queue {index} does not run: {self:?}");
            }
        }
    }

    /// The state that a successor would get says the same.
    pub fn check_state(&self, state: &[u8]) {
        let state: Value = serde_json::from_slice(state).unwrap();
        assert_eq!(state["features"], self.features);
        assert_eq!(state["protocol_features"], self.protocol);
        let kept = state["regions"].as_array().unwrap().iter().map(|kept| {
            let [guest, len, user, offset] =
                ["guest", "len", "user", "offset"].map(|key| kept[0][key].as_u64().unwrap());
            Region { guest, len, user, offset }
        });
        assert_eq!(kept.collect::<Vec<_>>(), self.regions);
        assert_eq!(!state["inflight"].is_null(), self.has_inflight);
        assert_eq!(!state["log"].is_null(), self.has_log);
        for (index, ring) in self.rings.iter().enumerate() {
            let kept = &state["vrings"][index];
            if kept.is_null() {
                // Nothing was said of this one, nor of those after it.
                let said = ring.size > 0 || ring.addresses.is_some() || ring.kick || ring.enabled;
                assert!(!said, "queue {index} is forgotten");
                continue;
            }
            assert_eq!(kept["size"], ring.size, "of queue {index}");
            let addresses = serde_json::to_value(ring.addresses).unwrap();
            assert_eq!(kept["addresses"], addresses, "of queue {index}");
            assert_eq!(kept["kick"] != 0, ring.kick, "of queue {index}");
            assert_eq!(kept["enabled"], ring.enabled, "of queue {index}");
        }
    }
}
