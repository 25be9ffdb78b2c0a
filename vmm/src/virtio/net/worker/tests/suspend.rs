//! Tests of suspending, resuming, saving and restoring a device.

use baton_protocol::migration::state::{NetState, Outline, TransportState};

use super::*;

impl Bench {
    fn use_memory(&self, memory: &GuestMemory) {
        let memory = memory.clone();
        self.call(|worker| worker.use_memory(memory)).unwrap();
    }

    fn restore(&self, state: &NetState) -> Result<(), NetError> {
        let state = state.clone();
        self.call(move |worker| worker.restore(&state))
    }
}

/// The rings of both queue pairs, of which the driver uses one.
const FIRST_PAIR: [&str; 4] =
    ["SET_VRING_ENABLE 0 1", "SET_VRING_ENABLE 1 1", "SET_VRING_ENABLE 2 0", "SET_VRING_ENABLE 3 0"];

/// Like [`bench`], with a driver, and a back-end that stops the rings at `bases`.
fn running(bases: &[u32]) -> (Bench, Serving) {
    let (mut bench, serving) = bench();
    serving.backend.lock().unwrap().bases = bases.to_vec();
    bench.activate(activation(VERSION_1 | MULTI_QUEUE));
    (bench, serving)
}

/// Returns the log entries from `since` on that start with one of `messages`.
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
fn suspended_device_resumes_at_its_bases() {
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
fn suspended_device_does_not_serve_its_control_virtqueue() {
    let (bench, serving) = running(&[]);
    bench.call(Worker::suspend);
    let control = queue(4);
    bench.prepare_command(0, &[4, 0, 2, 0]);
    bench.net.notify(4);
    // The worker has had its chance to serve the queue when this task has run.
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
fn restored_device_resumes_at_the_saved_bases() {
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
    // No ring is started yet.
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

/// Returns a device that was suspended, its state, and the outline from when it ran.
fn suspended() -> (Bench, NetState, Outline) {
    let (bench, serving) = running(&[7, 65535, 0, 1]);
    let outline = bench.call(|worker| worker.outline()).unwrap();
    bench.call(Worker::suspend);
    let state = state_of(&bench);
    bench.thread.stop();
    drop(serving.finish());
    (bench, state, outline)
}

#[test]
fn target_sends_two_messages_per_ring_during_the_blackout() {
    let (bench, state, outline) = suspended();
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
fn rings_that_change_after_prepare_are_set_up_again() {
    let changes: [fn(&mut NetState); 4] = [
        |state| state.transport.queues[1].used_ring += 0x1000,
        |state| state.transport.driver_features &= !MULTI_QUEUE,
        |state| state.driver.as_mut().unwrap().active_queue_pairs = 2,
        |state| state.driver = None,
    ];
    for change in changes {
        let (bench, mut state, outline) = suspended();
        change(&mut state);
        let (target, serving) = bench_with(None, FakeBackend::new(4));
        target.use_memory(&bench.memory);
        target.call(|worker| worker.prepare(outline)).unwrap();
        let since = log_length(&serving);
        target.restore(&state).unwrap();
        target.call(Worker::resume);
        // The prepared rings are disabled, and the changed ones are set up.
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
fn prepare_rejects_invalid_outlines() {
    let (bench, _, outline) = suspended();
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
fn back_end_that_reconnects_to_a_suspended_device_waits_for_resume() {
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
fn invalid_state_is_refused_before_the_back_end_sees_it() {
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
