//! The command `vublk`: inspects, measures and manages vublkd. [`vublk::tool`] is all of it.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    vublk::tool::run(vublk::tool::Typed::parse())
}
