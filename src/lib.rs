//! The crate behind `vublkd` and `vublk`.
