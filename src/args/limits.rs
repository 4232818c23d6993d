//! The options that limit a disk, of `vublkd` and of `vublk throttle`.
//!
//! What it is not: which of them go together is [`Limits`]'.
//!
//! Invariant: their names are those of [`NAMES`], so that options, keys and what is shown never differ.

use clap::builder::ValueParser;
use clap::{Arg, ArgMatches, Args, Command, Error, FromArgMatches};

use super::{number, size};
use crate::throttle::{Change, IOPS_SIZE, LONGEST, Limits, MOST, NAMES};

/// The limits that were typed; 0: none.
#[derive(Clone, Debug, Default)]
pub struct LimitArgs(pub Change);

impl LimitArgs {
    /// The limits, from none.
    ///
    /// # Errors
    /// A sentence that says what does not go together.
    pub fn mean(&self) -> Result<Limits, String> {
        Limits::default().changed(&self.0)
    }
}

fn option(name: &'static str, value: &'static str, help: String, parser: ValueParser) -> Arg {
    Arg::new(name).long(name).value_name(value).help(help).value_parser(parser).help_heading("Limits")
}

impl Args for LimitArgs {
    fn augment_args(command: Command) -> Command {
        let mut options = Vec::new();
        for [rate, max, length] in NAMES {
            let (what, of) = rate.split_once('-').unwrap_or_default();
            let (what, unit) = if what == "iops" { ("requests", "N") } else { ("bytes", "SIZE") };
            let parser = || match unit {
                "N" => ValueParser::new(number::<u64>(0, MOST)),
                _ => ValueParser::new(size),
            };
            let of = match of {
                "read" => "reads",
                "write" => "writes, discards and zeroes",
                _ => "reads and writes together",
            };
            let help = format!("Most {what} a second of {of}; the others wait in their queues. 0: no limit");
            options.push(option(rate, unit, help, parser()));
            let help = format!("The same in a burst, which is refilled by what --{rate} leaves unused");
            options.push(option(max, unit, help, parser()));
            let help = format!("How long a burst of --{max} lasts, in seconds [default: 1]");
            options.push(option(length, "N", help, ValueParser::new(number::<u64>(0, LONGEST))));
        }
        let help = "Requests of more bytes than this count as several in --iops-…";
        options.push(option(IOPS_SIZE, "SIZE", help.into(), ValueParser::new(size)));
        command.args(options)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for LimitArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let mut args = Self::default();
        args.update_from_arg_matches(matches)?;
        Ok(args)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        for name in NAMES.as_flattened().iter().chain([&IOPS_SIZE]) {
            if let Some(&value) = matches.get_one::<u64>(name) {
                self.0.insert((*name).to_owned(), value);
            }
        }
        Ok(())
    }
}
