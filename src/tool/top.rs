//! `vublk top`: what disks do, on a screen that follows it.
//!
//! What it is: a thread for each daemon that asks it, the terminal, and the keys.
//!
//! What it is not: [`model`] is what is known, [`draw`] what it looks like; both are pure.
//!
//! Invariants: no disk is asked more often than once a second. A daemon that does not answer keeps neither keys nor other
//! disks waiting. The terminal is as it was when the program ends, also by a signal.

mod draw;
mod model;

use std::collections::BTreeSet;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use ratatui::buffer::Buffer;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::Rect;

use self::model::{Model, Move};
use crate::find::{self, Place};
use crate::rates::{self, Key, Sample};
use crate::sys;
use crate::workers::wait_for;

/// How often a disk is asked, and daemons are looked for.
const EVERY: Duration = Duration::from_secs(1);
const FIND_EVERY: Duration = Duration::from_secs(2);
/// How often the screen is drawn.
const DRAW_EVERY: Duration = Duration::from_millis(200);
/// After so many questions without an answer a daemon that was found, and not named, is taken for gone.
const PATIENCE: u32 = 15;
/// Signals that end it, and that of a terminal of another size.
const SIGNALS: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGWINCH];

/// What a thread has found out.
enum News {
    /// Control sockets that there are.
    Controls(BTreeSet<PathBuf>),
    /// What a daemon's disks have counted, asked for at this time.
    Counted(Place, Instant, Vec<(Key, Sample)>),
    /// It does not answer.
    Silent(Place, String),
    /// It is not there any more.
    Gone(Place),
}

/// Asks a daemon once a second. `named`: it is expected to be there.
fn watch(place: &Place, named: bool, news: &Sender<News>) {
    let (mut answered, mut silent) = (false, 0);
    loop {
        let began = Instant::now();
        let told = match rates::sample(place, false) {
            Ok(all) => {
                (answered, silent) = (true, 0);
                News::Counted(place.clone(), began, all)
            }
            Err(why) => {
                silent += 1;
                if !named && find::is_stale(&why) && (!answered || silent > PATIENCE) {
                    let _ended = news.send(News::Gone(place.clone()));
                    return;
                }
                News::Silent(place.clone(), why.to_string())
            }
        };
        if news.send(told).is_err() {
            return;
        }
        std::thread::sleep((began + EVERY).saturating_duration_since(Instant::now()));
    }
}

/// Looks for daemons.
fn find(news: &Sender<News>) {
    while news.send(News::Controls(find::controls())).is_ok() {
        std::thread::sleep(FIND_EVERY);
    }
}

/// The model, and the threads that it hears from.
struct Top {
    model: Model,
    began: Instant,
    watched: BTreeSet<Place>,
    news: Receiver<News>,
    sender: Sender<News>,
}

impl Top {
    fn new(disks: &[PathBuf]) -> Result<Self, String> {
        let places = disks.iter().map(|word| find::place(word, None)).collect::<Result<Vec<_>, _>>()?;
        let (sender, news) = channel();
        let (model, began, watched) = (Model::default(), Instant::now(), BTreeSet::new());
        let mut top = Self { model, began, watched, news, sender };
        if places.is_empty() {
            let sender = top.sender.clone();
            start("find", move || find(&sender))?;
        }
        places.into_iter().try_for_each(|place| top.watch(place, true))?;
        Ok(top)
    }

    fn watch(&mut self, place: Place, named: bool) -> Result<(), String> {
        if self.watched.insert(place.clone()) {
            let sender = self.sender.clone();
            start("watch", move || watch(&place, named, &sender))?;
        }
        Ok(())
    }

    /// Takes in what threads have found out.
    fn hear(&mut self) -> Result<(), String> {
        while let Ok(news) = self.news.try_recv() {
            match news {
                News::Controls(all) => {
                    let places = all.into_iter().map(|control| Place { control, disk: None });
                    places.into_iter().try_for_each(|place| self.watch(place, false))?;
                }
                News::Counted(place, at, all) => {
                    self.model.counted(&place, at.saturating_duration_since(self.began), all);
                }
                News::Silent(place, why) => self.model.silent(&place, &why),
                News::Gone(place) => {
                    self.model.gone(&place);
                    self.watched.remove(&place);
                }
            }
        }
        self.model.go_on(self.began.elapsed());
        Ok(())
    }

    /// True: it was told to end.
    fn key(&mut self, code: KeyCode, modifiers: KeyModifiers) -> bool {
        let model = &mut self.model;
        match code {
            KeyCode::Char('c') if modifiers.contains(KeyModifiers::CONTROL) => return true,
            KeyCode::Char('q') => return true,
            KeyCode::Esc if !model.help => return true,
            KeyCode::Esc => model.help = false,
            KeyCode::Char('?' | 'h') => model.help = !model.help,
            KeyCode::Char('p') => model.pause(self.began.elapsed()),
            KeyCode::Char('s') => model.sort = model.sort.next(),
            KeyCode::Char('j') | KeyCode::Down => model.select(Move::Down),
            KeyCode::Char('k') | KeyCode::Up => model.select(Move::Up),
            KeyCode::Char('g') | KeyCode::Home => model.select(Move::First),
            KeyCode::Char('G') | KeyCode::End => model.select(Move::Last),
            _ => {}
        }
        false
    }

    /// Follows the disks on the terminal until it is told to end.
    fn follow(&mut self, signals: &OwnedFd) -> Result<(), String> {
        let failed = |e: io::Error| format!("the terminal: {e}");
        let mut terminal = ratatui::try_init().map_err(failed)?;
        let mut run = || loop {
            self.hear()?;
            let drawn = terminal.draw(|frame| draw::draw(&self.model, frame.buffer_mut()));
            drawn.map_err(failed)?;
            let stdin = io::stdin();
            wait_for(&[stdin.as_fd(), signals.as_fd()], Some(DRAW_EVERY)).map_err(failed)?;
            while let Some(signal) = sys::next_signal(signals) {
                // The next drawing finds the new size.
                if signal != libc::SIGWINCH.unsigned_abs() {
                    return Ok(());
                }
            }
            if sys::hung_up_within(&stdin, Duration::ZERO).map_err(failed)? {
                return Ok(()); // the terminal is gone
            }
            while event::poll(Duration::ZERO).map_err(failed)? {
                if let Event::Key(key) = event::read().map_err(failed)?
                    && key.kind != KeyEventKind::Release
                    && self.key(key.code, key.modifiers)
                {
                    return Ok(());
                }
            }
        };
        let done = run();
        ratatui::try_restore().map_err(failed)?;
        done
    }

    /// One screen, after so many seconds.
    fn once(&mut self, seconds: u32) -> Result<String, String> {
        // The answers to the last question are there a little later.
        let until = self.began + Duration::from_secs(seconds.into()) + EVERY / 4;
        while Instant::now() < until {
            std::thread::sleep(DRAW_EVERY.min(until.saturating_duration_since(Instant::now())));
            self.hear()?;
        }
        let size = |name: &str, usual: u16| {
            let said = std::env::var(name).ok().and_then(|text| text.parse::<u16>().ok());
            said.filter(|size| (10..=1000).contains(size)).unwrap_or(usual)
        };
        let mut screen = Buffer::empty(Rect::new(0, 0, size("COLUMNS", 80), size("LINES", 24)));
        draw::draw(&self.model, &mut screen);
        Ok(draw::text(&screen))
    }
}

fn start(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), String> {
    let thread = std::thread::Builder::new().name(name.into()).spawn(run);
    thread.map(drop).map_err(|e| format!("cannot start a thread: {e}"))
}

/// Follows these disks, or all.
pub(super) fn top(disks: &[PathBuf], once: Option<u32>) -> Result<(), String> {
    if let Some(seconds) = once {
        let text = Top::new(disks)?.once(seconds)?;
        let _broken_pipe = io::stdout().write_all(text.as_bytes());
        return Ok(());
    }
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return Err("there is no terminal: use vublk top --once, or vublk stat".into());
    }
    // Before the first thread starts.
    let signals = sys::block_signals(&SIGNALS).map_err(|e| format!("signals: {e}"))?;
    Top::new(disks)?.follow(&signals)
}
