#![no_main]
libfuzzer_sys::fuzz_target!(init: vublk_fuzz::ignore_sigpipe(), |data: &[u8]| vublk_fuzz::targets::session::run(data));
