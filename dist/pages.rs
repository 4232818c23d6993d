//! Writes the man pages and the shell completions of both programs, from their command lines.
//!
//! What it is not: a part of the programs. `make install` runs it; it needs no more of vublk than the command lines.
//!
//! Invariant: an option that is not hidden is in the man page and in the completions. What a command line does not know
//! (exit codes, files, signals) is in `dist/man`, and comes after the options.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory};
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;
use vublk::{args, tool};

const VUBLKD: &str = include_str!("man/vublkd.8");
const VUBLK: &str = include_str!("man/vublk.1");

/// Names the version and its date.
const CHANGELOG: &str = include_str!("../CHANGELOG.md");
/// What follows the options of a command of vublk.
const SUBCOMMAND: &str = ".SH SEE ALSO\n.BR vublk (1),\n.BR vublkd (8)\n";

fn main() -> io::Result<()> {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        return Err(io::Error::other("pages FOLDER: the folder to write into is missing"));
    };
    let mut daemon = visible(&args::Typed::command());
    let mut tool = visible(&tool::Typed::command());
    for (shell, name) in [(Shell::Bash, "bash"), (Shell::Zsh, "zsh"), (Shell::Fish, "fish")] {
        let folder = folder.join(name);
        fs::create_dir_all(&folder)?;
        generate_to(shell, &mut daemon.clone(), "vublkd", &folder)?;
        generate_to(shell, &mut tool.clone(), "vublk", &folder)?;
    }
    daemon.build();
    page(&folder.join("man8"), &daemon, "8", VUBLKD)?;
    tool = tool.disable_help_subcommand(true);
    tool.build();
    page(&folder.join("man1"), &tool, "1", VUBLK)?;
    for command in tool.get_subcommands() {
        // vublk-bench(1), which `man vublk bench` finds.
        page(&folder.join("man1"), command, "1", SUBCOMMAND)?;
    }
    Ok(())
}

/// The same command line without what it hides.
fn visible(command: &Command) -> Command {
    // clap's names live as long as the program.
    let mut shown = Command::new(&*command.get_name().to_owned().leak())
        .version(env!("CARGO_PKG_VERSION"))
        .args(command.get_arguments().filter(|arg| !arg.is_hide_set()))
        .subcommands(command.get_subcommands().filter(|command| !command.is_hide_set()).map(visible));
    if let Some(about) = command.get_about() {
        shown = shown.about(about.clone());
    }
    if let Some(about) = command.get_long_about() {
        shown = shown.long_about(about.clone());
    }
    shown
}

/// A man page: what clap_mangen makes of a command line, and the rest.
fn page(folder: &Path, command: &Command, section: &str, rest: &str) -> io::Result<()> {
    // "## 0.2.0 - 2026-11-27"
    let date = CHANGELOG
        .lines()
        .find_map(|line| line.strip_prefix("## ")?.split_once(" - "))
        .map_or("", |(_, date)| date);
    let version = concat!("vublk ", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone()).section(section).date(date).source(version).manual("vublk");
    let mut out = Vec::new();
    man.render_title(&mut out)?;
    man.render_name_section(&mut out)?;
    let usage = command.clone().render_usage().to_string();
    let usage = usage.strip_prefix("Usage: ").unwrap_or(&usage).replace('-', r"\-");
    out.extend(format!(".SH SYNOPSIS\n{usage}\n").bytes());
    man.render_description_section(&mut out)?;
    man.render_options_section(&mut out)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut out)?;
    }
    out.extend(rest.bytes());

    let text = String::from_utf8(out).map_err(io::Error::other)?;
    // Each part begins with it.
    let apostrophes = ".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n";
    let text = apostrophes.to_owned() + &text.replace(apostrophes, "").replace(".br\n\n.br\n", ".sp\n");
    let name = command.get_display_name().unwrap_or(command.get_name());
    fs::create_dir_all(folder)?;
    fs::write(folder.join(format!("{name}.{section}")), text)
}
