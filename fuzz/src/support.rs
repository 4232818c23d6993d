//! Those of the tests' support modules that start no process.

#[path = "../../tests/support/device.rs"]
pub mod device;
#[path = "../../tests/support/disk.rs"]
pub mod disk;
#[path = "../../tests/support/frontend.rs"]
pub mod frontend;
#[path = "../../tests/support/memory.rs"]
pub mod memory;
#[path = "../../tests/support/request.rs"]
pub mod request;
#[path = "../../tests/support/ring.rs"]
pub mod ring;
#[path = "../../tests/support/sys.rs"]
pub mod sys;

/// There are no processes here; `device` names one.
pub mod daemon {
    use super::frontend::Frontend;

    /// Has no value.
    pub enum Daemon {}

    impl Daemon {
        pub fn connect(&self) -> Frontend {
            match *self {}
        }
    }
}
