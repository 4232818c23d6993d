//! Choosing what happens: which outcome, how many pool pages, whose turn.
//!
//! What it is: [`explore`] runs a test again and again until every combination of choices was
//! made, with a bound on how many of them depart from the good path in one run. [`Choices`]
//! can also follow a script, or fail one operation stubbornly.
//!
//! What it is not: it knows no request. The caller that asks for a choice says how many options
//! there are; option 0 is the good path.
//!
//! Invariant: a run is determined by its choices, so a run that broke a rule can be repeated
//! with a log.

use arrayvec::ArrayVec;

use super::world::Checked;
use crate::engine::{Kind, Outcome};
use crate::op::action::Submit;

/// Outcomes that an operation may have here.
type Outcomes = ArrayVec<Outcome, 16>;

#[derive(Clone, Copy, Debug)]
struct Branch {
    taken: usize,
    options: usize,
    /// A departure from the good path, of which a run may have only so many.
    counts: bool,
}

#[derive(Debug)]
enum How {
    /// The path of this run; choices beyond its end take option 0.
    Explore { path: Vec<Branch>, at: usize, spent: u32, budget: u32 },
    /// One byte for each choice; below 160: option 0.
    Script(std::vec::IntoIter<u8>),
    /// Every operation but the first `skip` ends like this, for `times` times in all or, with
    /// `again`, each before it goes well. All else goes well.
    Stubborn { skip: usize, times: usize, again: Option<usize>, end: fn(u64) -> Outcome },
}

/// What happens in one run.
#[derive(Debug)]
pub(super) struct Choices {
    how: How,
    /// What happened; `None` in runs whose log is not printed.
    pub log: Option<Vec<String>>,
}

impl Choices {
    pub fn script(bytes: Vec<u8>) -> Self {
        Self { how: How::Script(bytes.into_iter()), log: None }
    }

    /// Operation number `skip`, and what is tried in its place, is not executed `times` times.
    pub fn not_executed(skip: usize, times: usize) -> Self {
        let end = |_| Outcome::NotExecuted(libc::EAGAIN);
        Self { how: How::Stubborn { skip, times, again: None, end }, log: None }
    }

    /// Every operation is not executed `times` times and then goes well.
    pub fn each_not_executed(times: usize) -> Self {
        let end = |_| Outcome::NotExecuted(libc::EAGAIN);
        Self { how: How::Stubborn { skip: 0, times, again: Some(times), end }, log: None }
    }

    /// No operation from number `skip` on moves more than 512 bytes.
    pub fn short(skip: usize) -> Self {
        let end = |len: u64| Outcome::Moved(len.min(512));
        Self { how: How::Stubborn { skip, times: usize::MAX, again: None, end }, log: None }
    }

    pub fn note(&mut self, what: impl FnOnce() -> String) {
        if let Some(log) = &mut self.log {
            log.push(what());
        }
    }

    /// A choice, every option but 0 of which departs from the good path.
    pub fn choose(&mut self, options: usize) -> usize {
        self.take(options, true)
    }

    /// A choice that is tried in full, however many there are.
    pub fn choose_freely(&mut self, options: usize) -> usize {
        self.take(options, false)
    }

    fn take(&mut self, options: usize, counts: bool) -> usize {
        match &mut self.how {
            How::Explore { path, at, spent, budget } => {
                if *at == path.len() {
                    let options = if counts && *spent == *budget { 1 } else { options };
                    path.push(Branch { taken: 0, options, counts });
                }
                let Branch { taken, counts, .. } = path[*at];
                *at += 1;
                *spent += u32::from(counts && taken > 0);
                taken
            }
            How::Script(bytes) => match bytes.next() {
                Some(byte) if byte >= 160 || !counts => usize::from(byte) % options,
                _ => 0,
            },
            How::Stubborn { .. } => 0,
        }
    }

    /// How an operation ends. `step`: counts the actions, to vary the errno where the machine
    /// only passes it on.
    pub fn outcome(&mut self, submit: &Submit, block: u64, step: u32) -> Outcome {
        let all = outcomes(submit, block, step);
        if let How::Stubborn { skip, times, again, end } = &mut self.how {
            if *skip > 0 {
                *skip -= 1;
            } else if *times > 0 {
                *times -= 1;
                return end(submit.len);
            } else {
                *times = again.unwrap_or(0);
            }
        }
        all[self.choose(all.len())]
    }
}

/// All that may happen to an operation, the good end first.
fn outcomes(submit: &Submit, block: u64, step: u32) -> Outcomes {
    let not_executed = [libc::ECANCELED, libc::EAGAIN, libc::EINTR][step as usize % 3];
    let mut all = Outcomes::new();
    match submit.kind {
        Kind::Read | Kind::Write { .. } => {
            let len = submit.len;
            all.push(Outcome::Moved(len));
            for short in [len.saturating_sub(512), block, 512, u64::from(block == 1)] {
                if short < len && short > 0 && !all.contains(&Outcome::Moved(short)) {
                    all.push(Outcome::Moved(short));
                }
            }
        }
        Kind::Fallocate(_) | Kind::Discard => all.push(Outcome::Failed(libc::ENOTTY)),
        Kind::Sync => {}
    }
    all.push(Outcome::Moved(0));
    if matches!(submit.kind, Kind::Fallocate(_) | Kind::Discard) {
        all.swap(0, 1);
    }
    all.push(Outcome::NotExecuted(not_executed));
    all.extend([libc::EIO, libc::EINVAL, libc::EOPNOTSUPP, libc::ENOSPC].map(Outcome::Failed));
    all
}

/// A rule that was broken, and how it came to that.
#[derive(Debug)]
pub(super) struct Broken {
    pub rule: &'static str,
    pub log: Vec<String>,
}

/// Runs `run` with every combination of choices, of which at most `budget` depart from the
/// good path in one run. How many runs there were.
pub(super) fn explore(budget: u32, mut run: impl FnMut(&mut Choices) -> Checked) -> Result<u64, Broken> {
    let mut runs = 0;
    let mut choices = Choices { how: How::Explore { path: Vec::new(), at: 0, spent: 0, budget }, log: None };
    loop {
        runs += 1;
        if let Err(rule) = run(&mut choices) {
            choices.rewind();
            choices.log = Some(Vec::new());
            let again = run(&mut choices);
            assert_eq!(again, Err(rule), "a run is determined by its choices");
            return Err(Broken { rule, log: choices.log.unwrap_or_default() });
        }
        if !choices.next_path() {
            return Ok(runs);
        }
        choices.rewind();
    }
}

impl Choices {
    fn rewind(&mut self) {
        if let How::Explore { at, spent, .. } = &mut self.how {
            (*at, *spent) = (0, 0);
        }
    }

    /// Depth first: the last choice that has an option left takes it. False: none has.
    fn next_path(&mut self) -> bool {
        let How::Explore { path, .. } = &mut self.how else { return false };
        while let Some(last) = path.last_mut() {
            if last.taken + 1 < last.options {
                last.taken += 1;
                return true;
            }
            path.pop();
        }
        false
    }
}
