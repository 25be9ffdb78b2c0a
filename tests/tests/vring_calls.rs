//! A driver is called when its rings run again, because the last call may be lost: the back-end may be killed between
//! the used index and the eventfd, or the call may go to a replaced descriptor. A driver that waits for this call makes
//! nothing available, so no other call follows (Cloud Hypervisor issues 8004 and 341).
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::os::fd::AsFd;
use std::time::Instant;

use baton_tests::backend::Rig;
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::wire::{MemoryRegion, Message, request};
use baton_tests::fake_frontend::{Device, GuestMemory, Options, Region};
use baton_tests::on_both_datapaths;
use baton_tests::process::PATIENCE;

on_both_datapaths! {
    driver_is_called_after_a_reconnect,
    driver_is_called_by_the_next_back_end,
    driver_is_called_when_its_rings_are_enabled_last,
    driver_is_called_when_its_rings_are_enabled_again,
    driver_is_called_when_its_rings_are_restarted,
    driver_is_called_on_a_new_call_descriptor,
    driver_is_called_when_the_memory_of_its_rings_returns,
    due_call_survives_the_next_message,
    driver_is_not_called_for_each_message,
}

const RX: u32 = 0;
const TX: u32 = 1;

/// When a ring gets its call descriptor.
#[derive(Clone, Copy, Debug)]
enum Call {
    BeforeKick,
    AfterKick,
}

const ORDERS: [Call; 2] = [Call::BeforeKick, Call::AfterKick];

/// A device whose driver has not looked at the last used buffers and gets no further call for them.
fn waiting_device(rig: &mut Rig) -> Device {
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
    let used = device.ring(RX).queue.used_index();
    rig.inject(0..10, 100).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while device.ring(RX).queue.used_index() != used.wrapping_add(10) {
        assert!(Instant::now() < deadline, "nothing is received");
        std::thread::yield_now();
    }
    device
}

/// Discards the calls made so far.
fn lose_calls(device: &mut Device) {
    for index in [RX, TX] {
        device.ring_mut(index).renew_events().unwrap();
    }
}

/// Sets up a ring, but neither enables nor kicks it.
fn set_up(device: &Device, index: u32, order: Call) {
    let (connection, ring) = (&device.connection, device.ring(index));
    connection.set_vring_num(index, ring.queue.size()).unwrap();
    connection.set_vring_base(index, ring.queue.used_index()).unwrap();
    connection.set_vring_addresses(index, &device.memory, ring.queue.addresses()).unwrap();
    if let Call::BeforeKick = order {
        connection.set_vring_call(index, Some(ring.call.as_fd())).unwrap();
    }
    connection.set_vring_kick(index, Some(ring.kick.as_fd())).unwrap();
    if let Call::AfterKick = order {
        connection.set_vring_call(index, Some(ring.call.as_fd())).unwrap();
    }
}

fn expect_calls(device: &Device) {
    let deadline = Instant::now() + PATIENCE;
    for index in [RX, TX] {
        assert!(device.ring(index).wait_call(deadline).unwrap(), "the driver of vring {index} is not called");
    }
}

/// Expects a call for the ten frames, and checks that traffic continues.
fn expect_driver_continues(rig: &mut Rig, device: &mut Device) {
    expect_calls(device);
    rig.expect_in_guest(device, 0..10).unwrap();
    rig.check_traffic(device).unwrap();
}

fn reconnect(rig: &mut Rig, device: &mut Device, order: Call) {
    lose_calls(device);
    device.connection = rig.backend.connect().unwrap();
    device.negotiate().unwrap();
    device.connection.set_memory_table(&device.memory).unwrap();
    for index in [RX, TX] {
        device.connection.set_vring_enable(index, true).unwrap();
        set_up(device, index, order);
    }
}

fn driver_is_called_after_a_reconnect(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    for order in ORDERS {
        let mut device = waiting_device(&mut rig);
        reconnect(&mut rig, &mut device, order);
        expect_driver_continues(&mut rig, &mut device);
    }
}

fn driver_is_called_by_the_next_back_end(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    for order in ORDERS {
        let mut device = waiting_device(&mut rig);
        rig.kill_backend().unwrap();
        rig.restart_backend().unwrap();
        reconnect(&mut rig, &mut device, order);
        expect_driver_continues(&mut rig, &mut device);
    }
}

fn driver_is_called_when_its_rings_are_enabled_last(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    for order in ORDERS {
        let mut device = waiting_device(&mut rig);
        lose_calls(&mut device);
        device.connection = rig.backend.connect().unwrap();
        device.negotiate().unwrap();
        device.connection.set_memory_table(&device.memory).unwrap();
        for index in [RX, TX] {
            set_up(&device, index, order);
        }
        for index in [RX, TX] {
            device.connection.set_vring_enable(index, true).unwrap();
        }
        expect_driver_continues(&mut rig, &mut device);
    }
}

fn driver_is_called_when_its_rings_are_enabled_again(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = waiting_device(&mut rig);
    for index in [RX, TX] {
        device.connection.set_vring_enable(index, false).unwrap();
    }
    for index in [RX, TX] {
        device.ring(index).take_calls().unwrap();
        device.connection.set_vring_enable(index, true).unwrap();
    }
    expect_driver_continues(&mut rig, &mut device);
}

fn driver_is_called_when_its_rings_are_restarted(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    for order in ORDERS {
        let mut device = waiting_device(&mut rig);
        for index in [RX, TX] {
            device.stop_ring(index).unwrap();
        }
        lose_calls(&mut device);
        for index in [RX, TX] {
            set_up(&device, index, order);
        }
        expect_driver_continues(&mut rig, &mut device);
    }
}

fn driver_is_called_on_a_new_call_descriptor(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = waiting_device(&mut rig);
    lose_calls(&mut device);
    for index in [RX, TX] {
        let ring = device.ring(index);
        device.connection.set_vring_kick(index, Some(ring.kick.as_fd())).unwrap();
        device.connection.set_vring_call(index, Some(ring.call.as_fd())).unwrap();
    }
    expect_driver_continues(&mut rig, &mut device);
}

/// Without its memory a ring is not started. A call descriptor that arrives meanwhile is signalled when the ring runs.
fn driver_is_called_when_the_memory_of_its_rings_returns(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = waiting_device(&mut rig);
    let elsewhere =
        MemoryRegion { guest_address: 1 << 40, size: 0x1_0000, user_address: 1 << 40, file_offset: 0 };
    let elsewhere = GuestMemory::from_regions(vec![Region::new(elsewhere).unwrap()]).unwrap();
    device.connection.set_memory_table(&elsewhere).unwrap();
    assert!(rig.backend.status().unwrap().vrings.iter().all(|vring| !vring.started));

    lose_calls(&mut device);
    for index in [RX, TX] {
        let ring = device.ring(index);
        device.connection.set_vring_call(index, Some(ring.call.as_fd())).unwrap();
        device.connection.set_vring_kick(index, Some(ring.kick.as_fd())).unwrap();
    }
    device.connection.set_memory_table(&device.memory).unwrap();
    assert!(rig.backend.status().unwrap().vrings.iter().all(|vring| vring.started));
    expect_driver_continues(&mut rig, &mut device);
}

/// The back-end gets both messages at once, and stops the ring once.
fn due_call_survives_the_next_message(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = waiting_device(&mut rig);
    lose_calls(&mut device);
    for index in [RX, TX] {
        let ring = device.ring(index);
        device.connection.set_vring_kick(index, Some(ring.kick.as_fd())).unwrap();
        let call = Message::u64(request::SET_VRING_CALL, index.into()).encode();
        let enable = Message::vring_state(request::SET_VRING_ENABLE, index, 1).encode();
        device.connection.send_bytes(&[call, enable].concat(), &[ring.call.as_fd()]).unwrap();
    }
    expect_driver_continues(&mut rig, &mut device);
}

fn driver_is_not_called_for_each_message(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    for index in [RX, TX] {
        device.ring_mut(index).queue.disable_calls();
    }
    // After this the worker has made all due calls.
    rig.worker_rounds(&mut device, 0).unwrap();
    rig.worker_rounds(&mut device, 0).unwrap();
    for index in [RX, TX] {
        device.ring(index).take_calls().unwrap();
    }
    for _ in 0..20 {
        device.connection.set_memory_table(&device.memory).unwrap();
        for index in [RX, TX] {
            let addresses = device.ring(index).queue.addresses();
            device.connection.set_vring_addresses(index, &device.memory, addresses).unwrap();
            device.connection.set_vring_enable(index, true).unwrap();
            device.connection.set_vring_kick(index, Some(device.ring(index).kick.as_fd())).unwrap();
        }
    }
    rig.worker_rounds(&mut device, 0).unwrap();
    for index in [RX, TX] {
        assert_eq!(device.ring(index).take_calls().unwrap(), 0, "vring {index}");
    }
}
