//! The device's thread against a back-end that writes down what it is asked.

use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use baton_protocol::migration::state::{NetState, Outline, TransportState};
use vm_memory::{Bytes, GuestAddress};

use super::super::device::Net;
use super::super::thread::NetThread;
use super::*;
use crate::vhost_user::fake_backend::{FakeBackend, Serving};
use crate::virtio::{QueueSetup, VirtioDevice};

/// Only catches a test that hangs.
const LIMIT: Duration = Duration::from_secs(60);
const VERSION_1: u64 = 1 << 32;
const MULTI_QUEUE: u64 = 1 << 22;
const ANNOUNCE: u64 = 1 << 21;

/// A device with two queue pairs, its guest's memory, and the place of its back-end.
struct Bench {
    listener: UnixListener,
    memory: GuestMemory,
    thread: NetThread,
    net: Net,
    _directory: tempfile::TempDir,
}

fn bench() -> (Bench, Serving) {
    let memory = crate::memory::allocate(64 << 20).unwrap();
    bench_with(Some(memory), FakeBackend::new(4))
}

/// Without memory, for a guest that has yet to arrive.
fn bench_with(memory: Option<GuestMemory>, backend: FakeBackend) -> (Bench, Serving) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let config: NetConfig = format!("socket={},queue-pairs=2", path.display()).parse().unwrap();
    let starter = {
        let memory = memory.clone();
        std::thread::spawn(move || NetThread::start("net0".to_owned(), &config, memory).unwrap())
    };
    let serving = backend.serve(listener.accept().unwrap().0);
    let (thread, net) = starter.join().unwrap();
    (Bench { listener, memory: memory.unwrap_or_default(), thread, net, _directory: directory }, serving)
}

/// Virtqueue `index` at a place of its own.
fn queue(index: u64) -> QueueSetup {
    let place = 0x10_0000 * (index + 1);
    QueueSetup {
        size: 16,
        ready: true,
        descriptor_table: place,
        available_ring: place + 0x1000,
        used_ring: place + 0x2000,
    }
}

fn activation(features: u64) -> Activation {
    Activation { features, queues: (0..5).map(queue).collect() }
}

fn wait_until<F: FnMut() -> bool>(mut condition: F) {
    let limit = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < limit, "it never happened");
        std::thread::yield_now();
    }
}

fn log_of(serving: &Serving, message: &str) -> Vec<String> {
    let log = serving.backend.lock().unwrap().log.clone();
    log.into_iter().filter(|entry| entry.starts_with(message)).collect()
}

impl Bench {
    /// Starts the device, and waits until its thread has done what it can.
    fn activate(&mut self, activation: Activation) {
        self.net.activate(activation);
        // It runs one task after the other.
        self.call(|_| ());
    }

    /// Has the worker run a task, and waits for the result.
    fn call<T: Send + 'static>(&self, task: impl FnOnce(&mut Worker) -> T + Send + 'static) -> T {
        self.thread.mailbox.call(|worker| Ok(task(worker))).unwrap()
    }

    fn use_memory(&self, memory: &GuestMemory) {
        let memory = memory.clone();
        self.call(|worker| worker.use_memory(memory)).unwrap();
    }

    fn restore(&self, state: &NetState) -> Result<(), NetError> {
        let state = state.clone();
        self.call(move |worker| worker.restore(&state))
    }

    /// Puts a command into the control virtqueue (index 4), rings its bell and waits for the answer.
    fn command(&self, number: u16, request: &[u8]) {
        self.prepare_command(number, request);
        self.net.notify(4);
        let used = GuestAddress(queue(4).used_ring + 2);
        wait_until(|| self.memory.read_obj::<u16>(used).unwrap() == number + 1);
    }

    fn prepare_command(&self, number: u16, request: &[u8]) {
        let control = queue(4);
        let (buffer, answer) = (0x80_0000, 0x81_0000);
        self.memory.write_slice(request, GuestAddress(buffer)).unwrap();
        let length = u32::try_from(request.len()).unwrap();
        for (index, (address, length, flags, next)) in
            [(buffer, length, 1_u16, 1_u16), (answer, 1, 2, 0)].into_iter().enumerate()
        {
            let at = GuestAddress(control.descriptor_table + 16 * u64::try_from(index).unwrap());
            let bytes = [
                &address.to_le_bytes()[..],
                &length.to_le_bytes(),
                &flags.to_le_bytes(),
                &next.to_le_bytes(),
            ];
            self.memory.write_slice(&bytes.concat(), at).unwrap();
        }
        self.memory.write_obj(number + 1, GuestAddress(control.available_ring + 2)).unwrap();
    }
}

#[test]
fn the_driver_chooses_its_queue_pairs() {
    let (mut bench, serving) = bench();
    bench.activate(activation(VERSION_1 | MULTI_QUEUE));
    let enables = || log_of(&serving, "SET_VRING_ENABLE");
    assert_eq!(enables(), ["0 1", "1 1", "2 0", "3 0"].map(|ring| format!("SET_VRING_ENABLE {ring}")));

    bench.command(0, &[4, 0, 2, 0]);
    let all = ["0 1", "1 1", "2 1", "3 1"].map(|ring| format!("SET_VRING_ENABLE {ring}"));
    assert_eq!(enables()[4..], all);
    assert_eq!(bench.thread.shared.status().active_queue_pairs, 2);
    bench.command(1, &[4, 0, 3, 0]);
    assert_eq!(bench.memory.read_obj::<u8>(GuestAddress(0x81_0000)).unwrap(), 1);
    assert_eq!(enables().len(), 8);

    bench.net.reset().wait();
    assert_eq!(log_of(&serving, "GET_VRING_BASE").len(), 4);
    assert_eq!(bench.thread.shared.status().active_queue_pairs, 1);
    bench.thread.stop();
    drop(serving.finish());
}

#[test]
fn a_new_back_end_goes_on_where_the_lost_one_stopped() {
    let (mut bench, serving) = bench();
    bench.activate(activation(VERSION_1 | MULTI_QUEUE | ANNOUNCE));
    bench.command(0, &[4, 0, 2, 0]);
    for (index, used) in [(0, 7_u16), (1, 65535), (2, 0), (3, 1)] {
        bench.memory.write_obj(used, GuestAddress(queue(index).used_ring + 2)).unwrap();
    }
    for event in bench.thread.shared.kicks.iter().chain(&bench.thread.shared.calls) {
        event::take(event);
    }

    bench.thread.shared.shut_down_connection();
    drop(serving.finish());
    let second = FakeBackend::new(4).serve(bench.listener.accept().unwrap().0);
    wait_until(|| log_of(&second, "SET_VRING_KICK").len() == 4);

    assert_eq!(log_of(&second, "SET_FEATURES"), ["SET_FEATURES 0x140600000"]);
    let bases = ["0 7", "1 65535", "2 0", "3 1"].map(|ring| format!("SET_VRING_BASE {ring}"));
    assert_eq!(log_of(&second, "SET_VRING_BASE"), bases);
    let enables = ["0 1", "1 1", "2 1", "3 1"].map(|ring| format!("SET_VRING_ENABLE {ring}"));
    assert_eq!(log_of(&second, "SET_VRING_ENABLE"), enables);
    for index in 0..4 {
        wait_until(|| event::take(&bench.thread.shared.kicks[index]));
        wait_until(|| event::take(&bench.thread.shared.calls[index]));
    }
    let mut status = [0; 2];
    wait_until(|| {
        bench.net.read_config(6, &mut status);
        status == [3, 0]
    });
    bench.command(1, &[3, 0]);
    bench.net.read_config(6, &mut status);
    assert_eq!(status, [1, 0]);
    bench.thread.stop();
    drop(second.finish());
}

#[test]
fn the_inflight_region_lives_as_long_as_the_drivers_rings() {
    let (mut bench, mut serving) = bench();
    let region = |serving: &Serving| serving.backend.lock().unwrap().inflight;
    let asked = |serving: &Serving| log_of(serving, "GET_INFLIGHT_FD");
    bench.activate(activation(VERSION_1 | MULTI_QUEUE));
    let first = region(&serving);
    assert!(first.is_some());
    assert_eq!(asked(&serving), ["GET_INFLIGHT_FD 4 16"]);
    for _ in 0..3 {
        bench.thread.shared.shut_down_connection();
        drop(serving.finish());
        serving = FakeBackend::new(4).serve(bench.listener.accept().unwrap().0);
        wait_until(|| log_of(&serving, "SET_VRING_KICK").len() == 4);
        assert_eq!((region(&serving), asked(&serving).len()), (first, 0));
    }

    // Reset, and started with larger rings.
    bench.net.reset().wait();
    let mut larger = activation(VERSION_1 | MULTI_QUEUE);
    larger.queues[1].size = 32;
    bench.activate(larger);
    let second = region(&serving);
    assert!(second.is_some() && second != first);
    assert_eq!(asked(&serving), ["GET_INFLIGHT_FD 4 32"]);

    // Reset and started while there is no back-end.
    bench.thread.shared.shut_down_connection();
    drop(serving.finish());
    bench.net.reset().wait();
    bench.activate(activation(VERSION_1 | MULTI_QUEUE));
    let serving = FakeBackend::new(4).serve(bench.listener.accept().unwrap().0);
    wait_until(|| log_of(&serving, "SET_VRING_KICK").len() == 4);
    assert_eq!(asked(&serving), ["GET_INFLIGHT_FD 4 16"]);
    assert!(region(&serving) != second && region(&serving) != first);
    bench.thread.stop();
    drop(serving.finish());
}

#[test]
fn a_device_whose_guest_is_dropped_leaves_its_back_end() {
    let (mut bench, serving) = bench();
    bench.activate(activation(VERSION_1 | MULTI_QUEUE));
    let Bench { thread, net, .. } = bench;
    drop(thread);
    // The thread has ended: nobody answers the vCPUs, which may still have the device.
    drop(serving.finish());
    let mut net = net;
    net.reset().wait();
    net.activate(activation(VERSION_1));
    assert!(net.events().needs_reset());
}

#[test]
fn a_back_end_with_fewer_features_is_not_used() {
    let (mut bench, serving) = bench();
    bench.activate(activation(VERSION_1 | MULTI_QUEUE));
    bench.thread.shared.shut_down_connection();
    drop(serving.finish());

    let mut lesser = FakeBackend::new(4);
    lesser.features &= !MULTI_QUEUE;
    let log = lesser.serve(bench.listener.accept().unwrap().0).finish().log;
    assert!(!log.iter().any(|entry| entry.starts_with("SET_FEATURES")), "{log:?}");
    let second = FakeBackend::new(4).serve(bench.listener.accept().unwrap().0);
    wait_until(|| log_of(&second, "SET_VRING_KICK").len() == 4);
    bench.thread.stop();
    drop(second.finish());
}

#[test]
fn a_driver_may_come_and_go_while_there_is_no_back_end() {
    let (mut bench, serving) = bench();
    bench.thread.shared.shut_down_connection();
    drop(serving.finish());
    bench.activate(activation(VERSION_1));
    bench.net.reset().wait();
    bench.activate(activation(VERSION_1 | MULTI_QUEUE));
    bench.thread.stop();
}

#[test]
fn virtqueues_outside_memory_are_refused_before_the_back_end_sees_them() {
    let (mut bench, serving) = bench();
    let mut wrong = activation(VERSION_1 | MULTI_QUEUE);
    wrong.queues[1].used_ring = 64 << 20;
    bench.activate(wrong);
    assert!(bench.thread.shared.events.needs_reset());
    assert!(log_of(&serving, "SET_FEATURES").is_empty());
    bench.activate(activation(VERSION_1 | MULTI_QUEUE));
    bench.thread.stop();
    drop(serving.finish());
}

#[test]
fn queues_that_are_not_ready_are_never_started() {
    let (mut bench, serving) = bench();
    let mut some = activation(VERSION_1);
    for index in [1, 3, 4] {
        some.queues[index].ready = false;
    }
    bench.activate(some);
    // Without multi-queue virtqueue 2 is the control virtqueue.
    assert_eq!(log_of(&serving, "SET_VRING_KICK"), ["SET_VRING_KICK 0"]);
    bench.thread.stop();
    drop(serving.finish());
}

#[test]
fn a_broken_control_ring_needs_a_reset() {
    let (mut bench, _serving) = bench();
    bench.activate(activation(VERSION_1 | MULTI_QUEUE));
    bench.memory.write_obj(17_u16, GuestAddress(queue(4).available_ring + 2)).unwrap();
    bench.net.notify(4);
    wait_until(|| bench.thread.shared.events.needs_reset());
    bench.net.reset().wait();
    bench.thread.stop();
}

/// The rings of both queue pairs, of which the driver uses one.
const FIRST_PAIR: [&str; 4] =
    ["SET_VRING_ENABLE 0 1", "SET_VRING_ENABLE 1 1", "SET_VRING_ENABLE 2 0", "SET_VRING_ENABLE 3 0"];

/// As [`bench`], with a driver, and a back-end that stops the rings where `bases` says.
fn running(bases: &[u32]) -> (Bench, Serving) {
    let (mut bench, serving) = bench();
    serving.backend.lock().unwrap().bases = bases.to_vec();
    bench.activate(activation(VERSION_1 | MULTI_QUEUE));
    (bench, serving)
}

/// The log's entries from `since` on that begin with one of these.
fn log_since(serving: &Serving, since: usize, messages: &[&str]) -> Vec<String> {
    let log = serving.backend.lock().unwrap().log[since..].to_vec();
    log.into_iter().filter(|entry| messages.iter().any(|message| entry.starts_with(message))).collect()
}

fn log_length(serving: &Serving) -> usize {
    serving.backend.lock().unwrap().log.len()
}

fn drain_events(shared: &NetShared) {
    for event in shared.kicks.iter().chain(&shared.calls) {
        event::take(event);
    }
}

fn state_of(bench: &Bench) -> NetState {
    let (identity, announce) = bench.thread.shared.offered();
    let queues = (0..5).map(|index| queue(index).into()).collect();
    let transport = TransportState {
        status: 15,
        driver_features: VERSION_1 | MULTI_QUEUE,
        queues,
        ..TransportState::default()
    };
    NetState { identity: identity.into(), transport, announce, driver: bench.call(|worker| worker.save()) }
}

#[test]
fn a_suspended_device_goes_on_where_it_stopped() {
    let (bench, serving) = running(&[7, 65535, 0, 1]);
    let before = log_length(&serving);
    bench.call(Worker::suspend);
    bench.call(Worker::suspend);
    assert_eq!(
        serving.backend.lock().unwrap().log[before..],
        (0..4).map(|index| format!("GET_VRING_BASE {index}")).collect::<Vec<_>>()
    );

    drain_events(&bench.thread.shared);
    let before = log_length(&serving);
    bench.call(Worker::resume);
    let bases = ["0 7", "1 65535", "2 0", "3 1"].map(|ring| format!("SET_VRING_BASE {ring}"));
    assert_eq!(log_since(&serving, before, &["SET_VRING_BASE", "SET_MEM_TABLE"]), bases);
    assert_eq!(log_since(&serving, before, &["SET_VRING_ENABLE"]), FIRST_PAIR);
    for index in 0..4 {
        assert_eq!(bench.thread.shared.kicks[index].read().unwrap(), 1);
        assert_eq!(bench.thread.shared.calls[index].read().unwrap(), 1);
    }
    bench.thread.stop();
    drop(serving.finish());
}

#[test]
fn a_suspended_device_leaves_its_control_virtqueue_alone() {
    let (bench, serving) = running(&[]);
    bench.call(Worker::suspend);
    let control = queue(4);
    bench.prepare_command(0, &[4, 0, 2, 0]);
    bench.net.notify(4);
    // It runs one task after the other, so it has had its chance when this has run.
    bench.call(|_| ());
    let used = GuestAddress(control.used_ring + 2);
    assert_eq!(bench.memory.read_obj::<u16>(used).unwrap(), 0);

    bench.call(Worker::resume);
    wait_until(|| bench.memory.read_obj::<u16>(used).unwrap() == 1);
    assert_eq!(bench.thread.shared.status().active_queue_pairs, 2);
    bench.thread.stop();
    drop(serving.finish());
}

#[test]
fn another_device_goes_on_with_a_guest() {
    let (bench, serving) = running(&[7, 65535, 0, 1]);
    bench.command(0, &[4, 0, 2, 0]);
    bench.call(Worker::suspend);
    let state = state_of(&bench);
    bench.thread.stop();
    drop(serving.finish());

    let (mut target, serving) = bench_with(None, FakeBackend::new(4));
    target.memory = bench.memory.clone();
    target.use_memory(&bench.memory);
    target.restore(&state).unwrap();
    assert_eq!(state_of(&target), state);
    let bases = ["0 7", "1 65535", "2 0", "3 1"].map(|ring| format!("SET_VRING_BASE {ring}"));
    assert_eq!(log_of(&serving, "SET_VRING_BASE"), bases);
    assert_eq!(log_of(&serving, "SET_MEM_TABLE").len(), 1);
    // Nothing that starts a ring.
    assert!(log_of(&serving, "SET_VRING_KICK").is_empty());

    target.call(Worker::resume);
    assert_eq!(log_of(&serving, "SET_VRING_KICK").len(), 4);
    assert_eq!(log_of(&serving, "SET_MEM_TABLE").len(), 1);
    let enables = ["0 1", "1 1", "2 1", "3 1"].map(|ring| format!("SET_VRING_ENABLE {ring}"));
    assert_eq!(log_of(&serving, "SET_VRING_ENABLE"), enables);
    // The control virtqueue's second command.
    target.command(1, &[4, 0, 1, 0]);
    assert_eq!(target.thread.shared.status().active_queue_pairs, 1);
    target.net.reset().wait();
    target.thread.stop();
    drop(serving.finish());
}

/// A guest's device that was suspended, its state, and what was told of it while it ran.
fn on_its_way() -> (Bench, NetState, Outline) {
    let (bench, serving) = running(&[7, 65535, 0, 1]);
    let outline = bench.call(|worker| worker.outline()).unwrap();
    bench.call(Worker::suspend);
    let state = state_of(&bench);
    bench.thread.stop();
    drop(serving.finish());
    (bench, state, outline)
}

#[test]
fn a_guest_stands_still_for_no_more_than_two_messages_a_ring() {
    let (bench, state, outline) = on_its_way();
    let (target, serving) = bench_with(None, FakeBackend::new(4));
    target.use_memory(&bench.memory);
    target.call(|worker| worker.prepare(outline)).unwrap();
    assert_eq!(log_since(&serving, 0, &["SET_VRING_ENABLE"]), FIRST_PAIR);
    assert_eq!(log_of(&serving, "SET_INFLIGHT_FD").len(), 1);

    let since = log_length(&serving);
    target.restore(&state).unwrap();
    let bases = ["0 7", "1 65535", "2 0", "3 1"].map(|ring| format!("SET_VRING_BASE {ring}"));
    assert_eq!(serving.backend.lock().unwrap().log[since..], bases);
    let since = log_length(&serving);
    target.call(Worker::resume);
    let kicks = (0..4).map(|ring| format!("SET_VRING_KICK {ring}"));
    assert_eq!(serving.backend.lock().unwrap().log[since..], kicks.collect::<Vec<_>>());
    target.thread.stop();
    drop(serving.finish());
}

#[test]
fn a_driver_may_change_its_rings_until_its_guest_stands_still() {
    let changes: [fn(&mut NetState); 4] = [
        |state| state.transport.queues[1].used_ring += 0x1000,
        |state| state.transport.driver_features &= !MULTI_QUEUE,
        |state| state.driver.as_mut().unwrap().active_queue_pairs = 2,
        |state| state.driver = None,
    ];
    for change in changes {
        let (bench, mut state, outline) = on_its_way();
        change(&mut state);
        let (target, serving) = bench_with(None, FakeBackend::new(4));
        target.use_memory(&bench.memory);
        target.call(|worker| worker.prepare(outline)).unwrap();
        let since = log_length(&serving);
        target.restore(&state).unwrap();
        target.call(Worker::resume);
        // What was told before is withdrawn, and all is told anew.
        let disabled = (0..4).map(|ring| format!("SET_VRING_ENABLE {ring} 0"));
        let log = log_since(&serving, since, &["SET_VRING_", "SET_FEATURES"]);
        assert!(log[..4].iter().cloned().eq(disabled), "{log:?}");
        let started = log_since(&serving, since, &["SET_VRING_KICK"]).len();
        let ready = state.transport.queues.len() - 1;
        let pairs = if state.transport.driver_features & MULTI_QUEUE == 0 { 2 } else { ready };
        assert_eq!(started, if state.driver.is_some() { pairs } else { 0 }, "{log:?}");
        let told = log_since(&serving, since, &["SET_FEATURES"]).len();
        assert_eq!(told, usize::from(state.driver.is_some()));
        target.thread.stop();
        drop(serving.finish());
    }
}

#[test]
fn what_was_told_of_a_guest_is_checked() {
    let (bench, _, outline) = on_its_way();
    let (target, serving) = bench_with(None, FakeBackend::new(4));
    target.use_memory(&bench.memory);
    let since = log_length(&serving);
    let wrong: [fn(&mut Outline); 5] = [
        |outline| outline.features |= 1,
        |outline| outline.active_queue_pairs = 0,
        |outline| outline.active_queue_pairs = 3,
        |outline| outline.queues.push(outline.queues[0]),
        |outline| outline.queues[1].used_ring = 64 << 20,
    ];
    for change in wrong {
        let mut outline = outline.clone();
        change(&mut outline);
        target.call(|worker| worker.prepare(outline)).unwrap_err();
    }
    assert_eq!(log_length(&serving), since);
    target.thread.stop();
    drop(serving.finish());
}

#[test]
fn a_back_end_that_comes_back_while_the_vm_stands_still_waits_for_it() {
    let (bench, serving) = running(&[7, 8, 9, 10]);
    bench.call(Worker::suspend);
    bench.thread.shared.shut_down_connection();
    drop(serving.finish());
    let second = FakeBackend::new(4).serve(bench.listener.accept().unwrap().0);
    wait_until(|| bench.thread.shared.status().backend == baton_protocol::control::Frontend::Connected);
    bench.call(|worker| worker.save());
    assert!(log_of(&second, "SET_FEATURES").is_empty());

    bench.call(Worker::resume);
    let bases = ["0 7", "1 8", "2 9", "3 10"].map(|ring| format!("SET_VRING_BASE {ring}"));
    assert_eq!(log_of(&second, "SET_VRING_BASE"), bases);
    assert_eq!(log_of(&second, "SET_VRING_KICK").len(), 4);
    bench.thread.stop();
    drop(second.finish());
}

#[test]
fn a_state_that_does_not_fit_is_refused_before_the_back_end_sees_it() {
    let (bench, serving) = running(&[7, 65535, 0, 1]);
    bench.call(Worker::suspend);
    let state = state_of(&bench);
    bench.thread.stop();
    drop(serving.finish());

    let broken = |change: fn(&mut NetState)| {
        let mut state = state.clone();
        change(&mut state);
        state
    };
    let no_base = broken(|state| state.driver.as_mut().unwrap().bases.truncate(3));
    let outside = broken(|state| state.transport.queues[1].used_ring = 64 << 20);
    let no_control = broken(|state| state.transport.queues[4].ready = false);
    let more_features = broken(|state| state.transport.driver_features |= 1);
    let (target, serving) = bench_with(None, FakeBackend::new(4));
    target.use_memory(&bench.memory);
    for state in [no_base, outside, no_control, more_features] {
        target.restore(&state).unwrap_err();
    }
    assert!(log_of(&serving, "SET_FEATURES").is_empty());
    target.thread.stop();
    drop(serving.finish());
}
