#![no_main]
// Its body is inside the crate, where the machine's model is.
libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk::op::tests::fuzzed::run(data));
