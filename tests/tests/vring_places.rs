//! Where a vring continues: one test for each rule of `VringSetup::place` (`backend/src/vring_setup.rs`). Front-ends
//! disagree about the base of a ring in use, but completion is in order, so the used index says how far the last device
//! was.
//!
//! libvhost-user does the same for devices that complete in order (`vu_set_vring_addr_exec`, "resuming"). For others it
//! adds the number of chains in flight in the inflight region to the used index (`vu_check_queue_inflights`).
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::time::Instant;

use baton_tests::backend::Rig;
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::net::NetHeader;
use baton_tests::fake_frontend::ring::Ring;
use baton_tests::fake_frontend::{Device, Options};
use baton_tests::frames;
use baton_tests::on_both_datapaths;
use baton_tests::process::PATIENCE;

on_both_datapaths! {
    used_index_overrides_a_base_ahead_of_it,
    used_index_0_overrides_a_base_ahead_of_it,
    used_index_overrides_a_base_behind_it,
    base_equal_to_the_used_index_is_used,
    used_ring_without_a_base_continues_from_its_used_index,
    fresh_ring_without_a_base_starts_at_0,
    impossible_used_index_is_ignored_without_a_base,
    fresh_ring_starts_at_its_base_despite_used_index_0,
    started_ring_keeps_its_place_through_other_messages,
    stopped_ring_continues_from_its_base,
    ring_that_the_driver_reset_starts_over_with_base_0,
    ring_that_the_driver_reset_starts_over_without_a_base,
    ring_that_the_driver_reset_starts_over_despite_its_old_base,
}

const RX: u32 = 0;
const TX: u32 = 1;
const SIZE: u16 = 256;

/// A device whose rings have been in use: all receive buffers are with the back-end.
fn used_device(rig: &mut Rig) -> Device {
    let mut device = rig.device(Options::default()).unwrap();
    for _ in 0..20 {
        rig.check_traffic(&mut device).unwrap();
    }
    device.wait_transmitted(0).unwrap();
    device
}

/// Connects the device to a new back-end, with these bases.
fn move_to_new_process(rig: &mut Rig, device: &mut Device, base: impl Fn(&Ring) -> Option<u16>) {
    rig.kill_backend().unwrap();
    rig.restart_backend().unwrap();
    device.connection = rig.backend.connect().unwrap();
    device.negotiate().unwrap();
    device.connection.set_memory_table(&device.memory).unwrap();
    for index in [RX, TX] {
        device.ring_mut(index).renew_events().unwrap();
        device.set_up_ring_with(index, base(device.ring(index))).unwrap();
        device.connection.set_vring_enable(index, true).unwrap();
        device.ring(index).kick().unwrap();
    }
}

/// Checks that both rings work, and stop at their used index.
fn check_continues(rig: &mut Rig, device: &mut Device) {
    for _ in 0..10 {
        rig.check_traffic(device).unwrap();
    }
    device.wait_transmitted(0).unwrap();
    for index in [RX, TX] {
        let base = device.stop_ring(index).unwrap();
        assert_eq!(base, device.ring(index).queue.used_index(), "vring {index}");
    }
}

fn check_used_ring_continues(datapath: Datapath, base: impl Fn(&Ring) -> Option<u16>) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = used_device(&mut rig);
    move_to_new_process(&mut rig, &mut device, base);
    check_continues(&mut rig, &mut device);
}

/// Cloud Hypervisor sets the available index.
fn used_index_overrides_a_base_ahead_of_it(datapath: Datapath) {
    check_used_ring_continues(datapath, |ring| Some(ring.queue.next_available()));
}

fn used_index_0_overrides_a_base_ahead_of_it(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    rig.backend.wait_started(RX).unwrap();
    rig.kill_backend().unwrap();
    for number in 0..50 {
        assert!(device.enqueue(0, &NetHeader::default(), &frames::numbered(number, 100)).unwrap());
    }
    device.flush(0).unwrap();
    rig.restart_backend().unwrap();
    device.connection = rig.backend.connect().unwrap();
    device.negotiate().unwrap();
    device.connection.set_memory_table(&device.memory).unwrap();
    for index in [RX, TX] {
        let queue = &device.ring(index).queue;
        assert_eq!((queue.used_index(), queue.next_available()), (0, [SIZE, 50][index as usize]));
        device.connection.set_vring_enable(index, true).unwrap();
        device.set_up_ring(index, queue.next_available()).unwrap();
        device.ring(index).kick().unwrap();
    }
    rig.expect_on_network(0..50).unwrap();
    check_continues(&mut rig, &mut device);
}

/// DPDK's virtio-user sets 0 (see `vring_base.rs`); this base is less wrong.
fn used_index_overrides_a_base_behind_it(datapath: Datapath) {
    check_used_ring_continues(datapath, |ring| Some(ring.queue.used_index() - 3));
}

/// QEMU sets the used index.
fn base_equal_to_the_used_index_is_used(datapath: Datapath) {
    check_used_ring_continues(datapath, |ring| Some(ring.queue.used_index()));
}

fn used_ring_without_a_base_continues_from_its_used_index(datapath: Datapath) {
    check_used_ring_continues(datapath, |_| None);
}

/// A device whose rings begin at these available and used indices, and are set up with this base.
fn fresh_device(rig: &mut Rig, available: u16, used: u16, base: Option<u16>) -> Device {
    let mut device = Device::new(rig.backend.connect().unwrap(), Options::default()).unwrap();
    device.negotiate().unwrap();
    device.connection.set_memory_table(&device.memory).unwrap();
    for index in [RX, TX] {
        device.ring_mut(index).queue.start_apart(available, used);
    }
    device.post_receive_buffers(0, usize::MAX).unwrap();
    for index in [RX, TX] {
        device.set_up_ring_with(index, base).unwrap();
        device.connection.set_vring_enable(index, true).unwrap();
        device.ring(index).kick().unwrap();
    }
    device
}

/// Checks that both rings work, and stop `apart` ahead of their used index.
fn check_starts(rig: &mut Rig, device: &mut Device, apart: u16) {
    for _ in 0..10 {
        rig.check_traffic(device).unwrap();
    }
    device.wait_transmitted(0).unwrap();
    for index in [RX, TX] {
        let base = device.stop_ring(index).unwrap();
        let used = device.ring(index).queue.used_index();
        assert_eq!(base, used.wrapping_add(apart), "vring {index}");
    }
}

fn fresh_ring_without_a_base_starts_at_0(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = fresh_device(&mut rig, 0, 0, None);
    check_starts(&mut rig, &mut device, 0);
}

fn impossible_used_index_is_ignored_without_a_base(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = fresh_device(&mut rig, 0, 5000, None);
    check_starts(&mut rig, &mut device, 0u16.wrapping_sub(5000));
}

fn fresh_ring_starts_at_its_base_despite_used_index_0(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = fresh_device(&mut rig, 40_000, 0, Some(40_000));
    check_starts(&mut rig, &mut device, 40_000);
}

/// A device whose receive ring started 100 ahead of its used index, which did not fit then. The ring now has fewer
/// buffers, so the used index fits and would be taken for the ring's place.
fn nearly_dry_device(rig: &mut Rig) -> Device {
    let device = fresh_device(rig, 100, 0, Some(100));
    rig.inject(0..200, 100).unwrap();
    wait_used(&device, 200);
    device
}

fn wait_used(device: &Device, index: u16) {
    let deadline = Instant::now() + PATIENCE;
    while device.ring(RX).queue.used_index() != index {
        assert!(
            Instant::now() < deadline,
            "the receive ring's used index is {}, not {index}",
            device.ring(RX).queue.used_index()
        );
        std::thread::yield_now();
    }
}

fn started_ring_keeps_its_place_through_other_messages(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    // The test does not touch the transmit ring.
    let mut device = nearly_dry_device(&mut rig);
    let connection = &device.connection;
    connection.set_features(device.options.features).unwrap();
    connection.set_memory_table(&device.memory).unwrap();
    connection.set_vring_addresses(RX, &device.memory, device.ring(RX).queue.addresses()).unwrap();
    connection.set_vring_enable(RX, false).unwrap();
    connection.set_vring_enable(RX, true).unwrap();
    rig.inject(200..210, 100).unwrap();
    wait_used(&device, 210);
    assert_eq!(device.stop_ring(RX).unwrap(), 310);
    rig.expect_in_guest(&mut device, 0..210).unwrap();
}

fn stopped_ring_continues_from_its_base(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = nearly_dry_device(&mut rig);
    assert_eq!(device.stop_ring(RX).unwrap(), 300);
    device.restart_ring(RX, 300).unwrap();
    rig.inject(200..210, 100).unwrap();
    wait_used(&device, 210);
    assert_eq!(device.stop_ring(RX).unwrap(), 310);
    rig.expect_in_guest(&mut device, 0..210).unwrap();
}

/// The driver resets both rings and fills the receive ring between a stop and a start on one connection.
fn check_reset_ring_starts_over(datapath: Datapath, base: impl Fn(u16) -> Option<u16>) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = used_device(&mut rig);
    let stopped = [RX, TX].map(|index| device.stop_ring(index).unwrap());
    let Device { memory, pairs, options, .. } = &mut device;
    let pair = &mut pairs[0];
    for ring in [&mut pair.receive, &mut pair.transmit] {
        ring.reset(memory, options.features).unwrap();
        ring.renew_events().unwrap();
    }
    device.post_receive_buffers(0, usize::MAX).unwrap();
    for (index, stopped) in [(RX, stopped[0]), (TX, stopped[1])] {
        assert_ne!(stopped, 0);
        device.set_up_ring_with(index, base(stopped)).unwrap();
        device.ring(index).kick().unwrap();
    }
    check_continues(&mut rig, &mut device);
}

fn ring_that_the_driver_reset_starts_over_with_base_0(datapath: Datapath) {
    check_reset_ring_starts_over(datapath, |_| Some(0));
}

fn ring_that_the_driver_reset_starts_over_without_a_base(datapath: Datapath) {
    check_reset_ring_starts_over(datapath, |_| None);
}

fn ring_that_the_driver_reset_starts_over_despite_its_old_base(datapath: Datapath) {
    check_reset_ring_starts_over(datapath, Some);
}
