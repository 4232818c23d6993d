//! What the session does around the workers, and the ends of a daemon's world: the guest's
//! cache mode, the last sync before an image changes hands, migrations, power cuts.
//!
//! The session's own fdatasync acts on the simulated disk, with the claim that
//! `Durability::sync` would make.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vublk::dirty::DirtyLog;
use vublk::durability::Durability;
use vublk::engine::Kind;
use vublk::nbd::marks::Marks;
use vublk::worker::Command;

use super::bugs::Bug;
use super::guest::Play;
use super::migration::Migration;
use super::model::Model;
use super::requests::What;

/// The cache mode, as everybody knows it.
#[derive(Clone, Copy, Debug)]
pub struct Mode {
    /// `--write-cache` of the daemons that are started.
    pub option: bool,
    /// What a successor is told; `None`: no guest was promised anything yet.
    pub kept: Option<bool>,
    /// What the driver takes it for. Off: what is answered is durable.
    pub write_back: bool,
    /// How often the driver changed it, and whether the sync of the last change was good.
    pub changes: u64,
    pub sound: bool,
}

impl Mode {
    pub fn new(option: bool) -> Self {
        Self { option, kept: None, write_back: option, changes: 0, sound: true }
    }
}

impl Play {
    fn durability(&self) -> &Durability {
        &self.device.as_ref().unwrap().durability
    }

    /// What a process does with the mode that an earlier one left, before a ring starts.
    pub fn take_over_mode(&mut self) {
        let kept = self.mode.kept.filter(|_| !self.has(Bug::ModeForgotten)).unwrap_or(self.mode.option);
        if self.durability().choose(kept) || !kept {
            let _nothing_else_runs = self.sync(false);
        }
        self.mode.kept = Some(kept);
    }

    /// An fdatasync by the control thread, while the workers go on or not. `None`: the daemon
    /// died of it.
    fn sync(&mut self, meanwhile: bool) -> Option<()> {
        let claim = self.durability().begin();
        let op = self.world.borrow().begin_sync();
        if meanwhile {
            for _ in 0..self.dice.below(self.setup.weather.delay + 1) {
                self.turn()?;
                self.look();
            }
        }
        let outcome = self.world.borrow_mut().end_sync(op);
        let _nothing_is_said = self.durability().end(claim, Kind::Sync, outcome);
        self.pass_on();
        Some(())
    }

    /// The driver writes `writeback` in the config space, while its requests run.
    pub fn change_mode(&mut self) {
        let write_back = !self.mode.write_back;
        self.count.mode_changes += 1;
        if write_back {
            // From now on what is answered may not be durable.
            (self.mode.write_back, self.mode.changes) = (true, self.mode.changes + 1);
        }
        while self.set_config(write_back).is_none() {
            // A keeper has the message: the successor carries it out. Without one the
            // connection is lost with the daemon, and the driver has no answer.
            if !self.setup.ours {
                return;
            }
        }
        if !write_back {
            // A driver is not told that this sync failed, nor that another one did meanwhile:
            // what it was answered before may be lost, and no later request says otherwise.
            let sound = !self.world.borrow().sync_failed;
            if sound {
                self.synced("by the end of write-back");
            }
            let Mode { option, kept, changes, .. } = self.mode;
            self.mode = Mode { option, kept, changes: changes + 1, write_back, sound };
        }
    }

    /// `Session::choose_cache`. `None`: the daemon died of it.
    fn set_config(&mut self, write_back: bool) -> Option<()> {
        // A region of the front-end's has a note; a keeper has the state after each message.
        if !write_back && !self.setup.ours {
            self.mode.kept = Some(false);
        }
        if self.durability().choose(write_back) || !write_back {
            self.sync(true)?;
        }
        self.mode.kept = Some(write_back);
        Some(())
    }

    /// A migration begins, or is given up, or ends; then the guest goes on here or elsewhere.
    pub fn migrate(&mut self) {
        let going_on = self.world.borrow().migration.is_some();
        if !going_on {
            let migration = Migration::new(&self.memory);
            self.world.borrow_mut().migration = Some(migration);
            if self.log_to(true).is_some() {
                self.begin_copy();
            }
            return;
        }
        if self.dice.rarely(2) {
            self.settle();
        }
        self.stop_all();
        let migration = self.world.borrow_mut().migration.take().unwrap();
        self.count.migrations += 1;
        migration.end();
        if self.dice.rarely(2) && self.hand_over() {
            return;
        }
        let _it_died =
            self.log_to(false).and_then(|()| (0..self.queues.len()).try_for_each(|at| self.start_queue(at)));
    }

    fn stop_all(&mut self) {
        // Another death only begins it anew.
        while !(0..self.queues.len()).all(|at| self.queues[at].base.is_some() || self.stop(at).is_some()) {}
    }

    /// No ring runs any more: the image goes to a daemon on another host. False: it stays,
    /// because what the guest was answered may be lost.
    fn hand_over(&mut self) -> bool {
        if !self.has(Bug::HandedOverUnsynced) && (self.sync(false).is_none() || self.sync_failed) {
            return false;
        }
        self.count.handed_over += 1;
        (0..self.queues.len()).for_each(|at| self.take_answers(at));
        {
            let world = &mut *self.world.borrow_mut();
            world.bury();
            if let Some(server) = &mut world.server {
                server.marks = Marks::default();
            } else if !self.setup.direct {
                world.disk.other_host();
            }
        }
        self.end();
        for sector in 0..self.model.len() as u64 {
            let value = self.world.borrow().read(sector);
            let may: Vec<u64> = self.model[sector as usize].values().collect();
            assert!(may.contains(&value), "sector {sector} holds {value:#x} on another host, not {may:x?}");
        }
        self.synced("by the hand-over");
        // With --incoming it takes the driver for one that was promised write-through.
        (self.mode.option, self.mode.kept) = (false, None);
        self.clear_region();
        self.start();
        true
    }

    fn clear_region(&self) {
        let bytes = self.region_file.metadata().unwrap().len();
        self.region_file.write_all_at(&vec![0; bytes as usize], 0).unwrap();
    }

    fn begin_copy(&mut self) {
        if let Some(migration) = &mut self.world.borrow_mut().migration {
            migration.begin();
        }
    }

    /// The log, and then the flag of each ring, on rings that run. `None`: the daemon
    /// died; its successor has both.
    fn log_to(&mut self, on: bool) -> Option<()> {
        let log: Option<Arc<DirtyLog>> = self.log();
        let set = (0..self.threads.len()).try_for_each(|worker| {
            let log = log.clone();
            self.ask(worker, |ack| Command::SetLog(log, ack))
        });
        let set = set.and_then(|()| {
            (0..self.queues.len()).try_for_each(|at| {
                let used = on.then_some(self.queues[at].ring.used);
                if self.queues[at].base.is_some() {
                    return Some(());
                }
                self.ask(self.setup.worker_of(at), |ack| Command::SetUsedLog(at as u16, used, ack))
            })
        });
        if set.is_none() {
            self.begin_copy();
        }
        set
    }

    /// What requests may have left in a sector whose answers the driver has not seen.
    pub fn add_unanswered(&self, sector: u64, may: &mut Vec<u64>) {
        for lane in self.lanes.iter().filter(|l| (l.sector..l.sector + l.count).contains(&sector)) {
            match &lane.what {
                Some(What::Write(values)) => may.push(values[(sector - lane.sector) as usize]),
                Some(What::Zero | What::Discard) => may.push(0),
                _ => {}
            }
        }
    }

    pub fn power_cut(&mut self) {
        self.count.power_cuts += 1;
        self.world.borrow_mut().power_cut();
        self.end();
        (self.sync_failed, self.dropped) = (false, false);
        if let Some(server) = &mut self.world.borrow_mut().server {
            (server.marks, server.is_found_gone) = (Marks::default(), false);
        }
        for sector in 0..self.model.len() as u64 {
            let value = self.world.borrow().read(sector);
            let mut may = self.model[sector as usize].left.clone();
            self.add_unanswered(sector, &mut may);
            let how = self.model[sector as usize].durable;
            assert!(
                may.contains(&value),
                "sector {sector} holds {value:#x} after a power cut, not {may:x?}, made durable {how}"
            );
            self.model[sector as usize] = Model::of(value);
        }
        // Another guest boots, with rings and a region of its own.
        self.world.borrow_mut().migration = None;
        self.lanes.iter_mut().for_each(|lane| lane.what = None);
        self.late.clear();
        self.owed.set(false);
        self.clear_region();
        self.mode = Mode { changes: self.mode.changes + 1, ..Mode::new(self.mode.option) };
        (0..self.queues.len()).for_each(|at| self.reboot_queue(at));
        self.start();
    }
}
