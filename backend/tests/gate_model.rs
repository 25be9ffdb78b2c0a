//! Runs the gate between a worker's thread and its owner under many interleavings (`shuttle`): no wake-up is lost, the
//! pair is always in exactly one place, and every kick is served.
#![expect(clippy::unwrap_used, reason = "these are tests")]

#[path = "../src/dataplane/gate.rs"]
#[expect(dead_code, reason = "the model does not time out, and no thread of it fails")]
mod gate;

/// The gate's primitives, instrumented by `shuttle`.
mod sync {
    pub use shuttle::sync::atomic::{AtomicBool, Ordering};
    pub use shuttle::sync::{Condvar, Mutex, MutexGuard};
}

use std::time::Duration;

use gate::{Gate, Wake};
use shuttle::sync::Arc;
use shuttle::thread;
use sync::{Condvar, Mutex};

/// The number of interleavings to try.
const ORDERS: usize = 20_000;
/// The number of preemptions in each.
const PREEMPTIONS: usize = 4;

/// Models what a thread waits for in epoll: kicks and the gate's wake, each reported once.
#[derive(Debug, Default)]
struct Events {
    state: Mutex<Pending>,
    changed: Condvar,
    /// Whether the gate's wakes are lost.
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

/// Models a queue pair: the number of kicks that it has served.
type Pair = u32;

/// Models the worker's thread of `worker.rs`. It keeps a pair that the kernel works on while it waits.
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

/// The owner gives the pair away and takes it back, twice; the second time as idle if `idle` is set. A kick may come at
/// any time. At the end the owner looks for kicks itself.
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
            // A resumed pair looks for work once.
            pair += events.take_kicks();
            gate.end();
            worker.join().unwrap();
            assert_eq!(pair, 1);
        },
        ORDERS,
        PREEMPTIONS,
    );
}

/// The thread serves a kick that comes at any time, without an owner that takes the pair back.
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
fn owner_always_gets_the_pair_back() {
    model(false, false, false);
}

#[test]
fn owner_gets_back_a_pair_that_it_laid_down() {
    model(false, true, false);
}

#[test]
fn owner_gets_back_a_pair_that_the_kernel_works_on() {
    model(false, false, true);
}

#[test]
fn thread_serves_a_kick_that_comes_at_any_time() {
    served_by_the_thread(false);
}

/// Checks that the model can fail.
#[test]
#[should_panic(expected = "deadlock")]
fn model_detects_a_lost_wake_up() {
    model(true, false, false);
}
