//! Tests of the machine: its actions are carried out on byte arrays, under every outcome.
//!
//! What it is: [`request`] carries actions out and checks each against the rules, [`world`]
//! has the byte arrays and judges them at the end, [`explore`] chooses what happens. The other
//! modules say which requests are tried: [`cases`] one at a time, [`together`] several at once,
//! `random` random ones, [`fuzzed`] those of the fuzzer. [`mistakes`] plants mistakes to show that the rules notice them.
//!
//! What it is not: no worker, engine, ring or file is involved. What the kernel really does
//! is tested in `tests/`.
//!
//! Invariant: a broken rule is an `Err` and never a panic of the harness, so that a planted
//! mistake can be told from a broken test.
//!
//! ```text
//!   Op ──action──► Request::advance ──► World: file, memory, locks
//!    ▲                  │ ▲
//!    └─────input────────┘ └── Choices: the outcome, out of all that are possible
//! ```
#![expect(clippy::cast_possible_truncation, reason = "sizes here are small")]
#![cfg_attr(fuzzing, allow(dead_code, unused_imports))] // it needs no more than `fuzzed` and what that is made of

mod cases;
mod explore;
pub mod fuzzed;
mod mistakes;
#[cfg(test)]
mod random;
mod request;
mod together;
mod world;
