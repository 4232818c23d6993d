//! Writes the man pages and the shell completions of both programs, from their command lines.
//!
//! What it is not: a part of the programs. `make install` runs it; it needs no more of vublk than the command lines.
//!
//! Invariant: an option that is not hidden is in the man page and in the completions. What a command line does not know
//! (exit codes, files, signals) is in `dist/man`, and comes after the options.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Command, CommandFactory};
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;
use vublk::{args, tool};

const VUBLKD: &str = include_str!("man/vublkd.8");
const VUBLK: &str = include_str!("man/vublk.1");
const FILE: &str = include_str!("man/vublk.toml.5");

/// What vublk.toml(5) says before its keys.
const FILE_DESCRIPTION: &str = "\
The file of
.B vublkd \\-\\-config
is TOML. It names the disks that one process serves, 64 at most: each is a table that begins with
.BR [[disk]] .
Keys are the names of options, and their values are judged as on the command line. A value is a text or a number; where an option takes
.B on
or
.BR off ,
also
.B true
or
.BR false .
.PP
Keys of the process stand before the first table. An option of the process on the command line goes before its key. Options of a disk are not
taken on the command line beside a file.
.PP
vublkd reads the file when it starts and at an upgrade, and not after a crash. A file that makes no sense is refused at the start; at an upgrade the
disks that were served are served as before, and the log says why.
";
/// The key that is no option.
const NAME: &str = "\
.TP
.B name
What commands, logs and metrics call the disk: letters, digits, and . _ \\-, 64 at most [default: the name of its socket, without folder and
ending]. It may not change: a table of another name is another disk.
";

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
    page_of_file(&folder.join("man5"))?;
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

/// The man page of the file of several disks: its keys are options.
fn page_of_file(folder: &Path) -> io::Result<()> {
    let mut out = Vec::new();
    let named = Command::new("vublk.toml");
    man_of(&named, "5").render_title(&mut out)?;
    let mut text = String::from_utf8(out).map_err(io::Error::other)?;
    text.push_str(".SH NAME\nvublk.toml \\- the disks of one vublkd\n.SH DESCRIPTION\n");
    text.push_str(FILE_DESCRIPTION);
    text.push_str(".SH KEYS OF A DISK\n");
    text.push_str(NAME);
    // A descriptor's number is for the command line.
    text.push_str(&keys::<args::disk::DiskArgs>(&["fd"]));
    text.push_str(".SH KEYS OF THE PROCESS\n");
    text.push_str(&keys::<args::ProcessArgs>(&[]));
    text.push_str(FILE);
    fs::create_dir_all(folder)?;
    fs::write(folder.join("vublk.toml.5"), text)
}

/// Options as keys, each with what its help says.
fn keys<A: Args>(but: &[&str]) -> String {
    let command = A::augment_args(Command::new("keys"));
    let mut text = String::new();
    for option in command.get_arguments().filter(|option| !option.is_hide_set()) {
        let Some(key) = option.get_long().filter(|key| !but.contains(key)) else { continue };
        let mut says =
            option.get_long_help().or(option.get_help()).map(ToString::to_string).unwrap_or_default();
        let values = option.get_possible_values();
        if !values.is_empty() && option.get_action().takes_values() && !option.is_hide_possible_values_set() {
            let values: Vec<_> = values.iter().map(|value| value.get_name()).collect();
            says += &format!(" [one of: {}]", values.join(", "));
        }
        let defaults: Vec<_> =
            option.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
        if !defaults.is_empty() {
            says += &format!(" [default: {}]", defaults.join(", "));
        }
        let value = match option.get_value_names() {
            // One that is there or not.
            _ if !option.get_action().takes_values() => " true|false".to_owned(),
            Some([name, ..]) => format!(" \\fI{}\\fR", roff(name)),
            _ => String::new(),
        };
        text += &format!(".TP\n\\fB{}\\fR ={value}\n{}\n", roff(key), roff(&says));
    }
    text
}

/// Text that is not taken for a request or a hyphen.
fn roff(text: &str) -> String {
    let text = text.replace('\\', r"\e").replace('-', r"\-").replace("\n\n", "\n.sp\n");
    if text.starts_with(['.', '\'']) { format!(r"\&{text}") } else { text }
}

/// The head of a page: its date and version are those of the changelog.
fn man_of(command: &Command, section: &str) -> Man {
    // "## 0.2.0 - 2026-11-27"
    let date = CHANGELOG
        .lines()
        .find_map(|line| line.strip_prefix("## ")?.split_once(" - "))
        .map_or("", |(_, date)| date);
    let version = concat!("vublk ", env!("CARGO_PKG_VERSION"));
    Man::new(command.clone()).section(section).date(date).source(version).manual("vublk")
}

/// A man page: what clap_mangen makes of a command line, and the rest.
fn page(folder: &Path, command: &Command, section: &str, rest: &str) -> io::Result<()> {
    let man = man_of(command, section);
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
