//! The tool beside the daemon, for people.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use vublk::bench;
use vublk::disk::{Disk, Options};
use vublk::engine::uring::Uring;

/// The tool beside vublkd.
#[derive(Debug, Parser)]
#[command(name = "vublk", version, max_term_width = 100)]
struct Typed {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Loads a vhost-user-blk back-end and tells how fast it is
    Bench(bench::Options),
    /// Opens a disk as vublkd would, tells what it found, and closes it again
    Inspect {
        /// The file or block device
        disk: PathBuf,
        /// Through the page cache, as with vublkd --direct=off
        #[arg(long)]
        buffered: bool,
    },
}

fn main() -> ExitCode {
    let text = match Typed::parse().command {
        Command::Inspect { disk, buffered } => inspect(disk, !buffered).map_err(|e| e.to_string()),
        Command::Bench(options) => measure(&options).map_err(|e| format!("{}: {e}", options.socket)),
    };
    match text {
        Ok(text) => {
            // Whoever reads it decides what a broken pipe means.
            let _printed = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Err(why) => {
            let _nobody_reads = writeln!(std::io::stderr(), "vublk: {why}");
            ExitCode::FAILURE
        }
    }
}

fn measure(options: &bench::Options) -> io::Result<String> {
    let report = bench::run(options)?;
    if options.json { Ok(serde_json::to_string(&report)? + "\n") } else { Ok(report.to_string()) }
}

fn inspect(path: PathBuf, direct: bool) -> Result<String, vublk::disk::DiskError> {
    let options = Options {
        path: path.clone(),
        direct,
        read_only: true,
        logical_block_size: None,
        serial: String::new(),
        lock: false,
        instance: format!("inspect-{}", std::process::id()),
    };
    let disk = Disk::open(&options, &|| false)?;
    let facts = disk.facts();
    let kind = if facts.is_device { "block device" } else { "file" };
    let yes = |on| if on { "yes" } else { "no" };
    let io_uring = Uring::probe().map_or_else(|e| format!("no: {e}"), |()| "yes".into());
    Ok(format!(
        "{}: {kind}, {} bytes\n\
         block              {} bytes, physical {}\n\
         optimal I/O        {} bytes (0: unknown)\n\
         direct I/O         {}: offsets in multiples of {}, buffers of {}\n\
         discard in units   {} bytes\n\
         durable writes     {}\n\
         io_uring           {io_uring}\n",
        path.display(),
        facts.size,
        facts.logical_block,
        facts.physical_block,
        facts.optimal_io,
        yes(direct),
        facts.offset_align,
        disk.mem_align(),
        facts.discard_granularity,
        if facts.dsync { "RWF_DSYNC" } else { "by fdatasync" },
    ))
}
