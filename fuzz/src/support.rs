//! Those of the tests' support modules that start no process.

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
