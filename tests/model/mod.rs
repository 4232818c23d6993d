//! Models that the code under test is compared with. Both the random tests and the fuzz targets
//! (`fuzz/`) use them, so nothing here may need a test framework.

pub mod chains;
pub mod plain;
pub mod ring;
