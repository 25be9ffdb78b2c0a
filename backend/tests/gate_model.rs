//! The gate between a worker's thread and its owner, under many orders of their steps (`shuttle`): no wake-up is lost, the
//! pair is always with one of them, and every kick is served.
#![expect(clippy::unwrap_used, reason = "these are tests")]

#[path = "../src/dataplane/gate.rs"]
#[expect(dead_code, reason = "the model does not time out, and no thread of it fails")]
mod gate;

/// What the gate is made of here.
mod sync {
    pub use shuttle::sync::atomic::{AtomicBool, Ordering};
    pub use shuttle::sync::{Condvar, Mutex, MutexGuard};
}

use std::time::Duration;

use gate::{Gate, Wake};
use shuttle::sync::Arc;
use shuttle::thread;
use sync::{Condvar, Mutex};

/// How many orders are tried.
const ORDERS: usize = 20_000;
/// In each, at so many places another thread goes on.
const PREEMPTIONS: usize = 4;

/// What a thread waits for in epoll: kicks and the gate's wake, each told once.
#[derive(Debug, Default)]
struct Events {
    state: Mutex<Pending>,
    changed: Condvar,
    /// The gate's wakes get lost.
    loses: bool,
}

#[derive(Debug, Default)]
struct Pending {
    told: bool,
    kicks: u32,
}

impl Events {
    fn kick(&self) {
        let mut pending = self.state.lock().unwrap();
        pending.kicks += 1;
        pending.told = true;
        drop(pending);
        self.changed.notify_all();
    }

    fn wait(&self) {
        let mut pending = self.state.lock().unwrap();
        while !std::mem::take(&mut pending.told) {
            pending = self.changed.wait(pending).unwrap();
        }
    }

    fn take_kicks(&self) -> u32 {
        std::mem::take(&mut self.state.lock().unwrap().kicks)
    }
}

impl Wake for Arc<Events> {
    fn wake(&self) {
        if !self.loses {
            self.state.lock().unwrap().told = true;
            self.changed.notify_all();
        }
    }
}

/// A queue pair: how many kicks it has served.
type Pair = u32;

/// The worker's thread, as `worker.rs` has it. It keeps a pair that the kernel works on while it waits.
fn work(gate: &Gate<Pair, Arc<Events>>, events: &Events, in_kernel: bool) {
    let mut held = None;
    if !gate.listen() {
        match gate.pick_up() {
            Some((pair, _)) => held = Some(pair),
            None => return,
        }
    }
    loop {
        if let Some(mut pair) = held.take() {
            if gate.is_closed() {
                gate.park(pair);
            } else {
                pair += events.take_kicks();
                if in_kernel {
                    held = Some(pair);
                } else {
                    gate.wait_with(pair);
                }
            }
        }
        events.wait();
        if held.is_none() {
            match gate.pick_up() {
                Some((pair, _)) => held = Some(pair),
                None => return,
            }
        }
    }
}

/// The owner gives the pair twice and takes it back, the second time `idle`, while a kick comes at any time; then it looks
/// itself.
fn model(loses: bool, idle: bool, in_kernel: bool) {
    shuttle::check_pct(
        move || {
            let events = Arc::new(Events { loses, ..Events::default() });
            let gate = Arc::new(Gate::new(Arc::clone(&events)));
            let worker = {
                let (gate, events) = (Arc::clone(&gate), Arc::clone(&events));
                thread::spawn(move || work(&gate, &events, in_kernel))
            };
            let kicker = {
                let events = Arc::clone(&events);
                thread::spawn(move || events.kick())
            };
            let mut pair = 0;
            for turn in 0..2 {
                gate.open();
                if idle && turn > 0 {
                    gate.lay_down(pair);
                } else {
                    gate.give(pair);
                }
                pair = gate.take_back(Duration::MAX, |_| None).unwrap();
            }
            kicker.join().unwrap();
            // As a pair that is resumed looks at everything once.
            pair += events.take_kicks();
            gate.end();
            worker.join().unwrap();
            assert_eq!(pair, 1);
        },
        ORDERS,
        PREEMPTIONS,
    );
}

/// The thread alone, without an owner that takes the pair back, serves a kick that comes at any time.
fn served_by_the_thread(loses: bool) {
    shuttle::check_pct(
        move || {
            let events = Arc::new(Events { loses, ..Events::default() });
            let gate = Arc::new(Gate::new(Arc::clone(&events)));
            let worker = {
                let (gate, events) = (Arc::clone(&gate), Arc::clone(&events));
                thread::spawn(move || {
                    gate.listen();
                    let mut served = 0;
                    while served == 0 {
                        events.wait();
                        let (pair, _) = gate.pick_up().unwrap();
                        served = pair + events.take_kicks();
                        gate.wait_with(served);
                    }
                })
            };
            gate.open();
            gate.give(0);
            events.kick();
            worker.join().unwrap();
            assert_eq!(gate.take_back(Duration::MAX, |_| None), Some(1));
        },
        ORDERS,
        PREEMPTIONS,
    );
}

#[test]
fn the_owner_always_gets_the_pair_back() {
    model(false, false, false);
}

#[test]
fn the_owner_gets_back_a_pair_that_it_laid_down() {
    model(false, true, false);
}

#[test]
fn the_owner_gets_back_a_pair_that_the_kernel_works_on() {
    model(false, false, true);
}

#[test]
fn the_thread_serves_a_kick_that_comes_at_any_time() {
    served_by_the_thread(false);
}

/// That the model can fail.
#[test]
#[should_panic(expected = "deadlock")]
fn a_lost_wake_up_is_found() {
    model(true, false, false);
}
