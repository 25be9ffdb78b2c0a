//! Tests of the worker with a back-end that records its messages.

mod suspend;

use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::super::device::Net;
use super::super::thread::NetThread;
use super::*;
use crate::vhost_user::fake_backend::{FakeBackend, Serving};
use crate::virtio::{QueueSetup, VirtioDevice};

/// Reached only if a test hangs.
const LIMIT: Duration = Duration::from_secs(60);
const VERSION_1: u64 = 1 << 32;
const MULTI_QUEUE: u64 = 1 << 22;
const ANNOUNCE: u64 = 1 << 21;

/// A device with two queue pairs, its guest's memory, and the listener of its back-end.
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

/// Without `memory`, the guest has yet to arrive.
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

/// Returns virtqueue `index`, each at a different address.
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
        assert!(Instant::now() < limit, "the condition was not met in time");
        std::thread::yield_now();
    }
}

fn log_of(serving: &Serving, message: &str) -> Vec<String> {
    let log = serving.backend.lock().unwrap().log.clone();
    log.into_iter().filter(|entry| entry.starts_with(message)).collect()
}

impl Bench {
    /// Starts the device, and waits until its thread has handled that.
    fn activate(&mut self, activation: Activation) {
        self.net.activate(activation);
        // The worker runs tasks in order, so the start is done when this task ends.
        self.call(|_| ());
    }

    /// Runs a task on the worker, and waits for the result.
    fn call<T: Send + 'static>(&self, task: impl FnOnce(&mut Worker) -> T + Send + 'static) -> T {
        self.thread.mailbox.call(|worker| Ok(task(worker))).unwrap()
    }

    /// Puts a command into the control virtqueue (index 4), kicks it and waits for the answer.
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
fn driver_sets_the_number_of_queue_pairs() {
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
fn new_back_end_starts_at_the_used_indices() {
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
fn inflight_region_is_kept_as_long_as_the_drivers_rings() {
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

    // Reset, then start with larger rings.
    bench.net.reset().wait();
    let mut larger = activation(VERSION_1 | MULTI_QUEUE);
    larger.queues[1].size = 32;
    bench.activate(larger);
    let second = region(&serving);
    assert!(second.is_some() && second != first);
    assert_eq!(asked(&serving), ["GET_INFLIGHT_FD 4 32"]);

    // Reset and start without a back-end.
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
fn dropping_the_thread_disconnects_the_back_end() {
    let (mut bench, serving) = bench();
    bench.activate(activation(VERSION_1 | MULTI_QUEUE));
    let Bench { thread, net, .. } = bench;
    drop(thread);
    // The thread has ended, but vCPUs may still access the device: they must not block.
    drop(serving.finish());
    let mut net = net;
    net.reset().wait();
    net.activate(activation(VERSION_1));
    assert!(net.events().needs_reset());
}

#[test]
fn back_end_with_fewer_features_is_not_used() {
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
fn driver_can_start_and_reset_the_device_without_a_back_end() {
    let (mut bench, serving) = bench();
    bench.thread.shared.shut_down_connection();
    drop(serving.finish());
    bench.activate(activation(VERSION_1));
    bench.net.reset().wait();
    bench.activate(activation(VERSION_1 | MULTI_QUEUE));
    bench.thread.stop();
}

#[test]
fn virtqueues_outside_guest_memory_are_refused_before_the_back_end_sees_them() {
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
fn broken_control_ring_needs_a_reset() {
    let (mut bench, _serving) = bench();
    bench.activate(activation(VERSION_1 | MULTI_QUEUE));
    bench.memory.write_obj(17_u16, GuestAddress(queue(4).available_ring + 2)).unwrap();
    bench.net.notify(4);
    wait_until(|| bench.thread.shared.events.needs_reset());
    bench.net.reset().wait();
    bench.thread.stop();
}
