//! A driver is called when its device goes on: the call for what was used before may have been lost, with the back-end
//! that was killed between the used index and the eventfd, or with the descriptor that it went to. A driver that waits for
//! it makes nothing available meanwhile, and so is not called otherwise (Cloud Hypervisor issues 8004 and 341).
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
    a_driver_is_called_after_a_reconnect,
    a_driver_is_called_by_the_next_back_end,
    a_driver_is_called_when_its_rings_are_enabled_last,
    a_driver_is_called_when_its_rings_are_enabled_again,
    a_driver_is_called_when_its_rings_are_started_again,
    a_driver_is_called_on_a_new_call_descriptor,
    a_driver_is_called_when_the_memory_of_its_rings_returns,
    a_call_that_is_due_outlasts_the_next_message,
    a_driver_is_called_once_and_not_for_each_message,
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

/// A device whose driver has seen nothing of what was used last, and is called no more for that.
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

/// Loses the calls so far.
fn lose_calls(device: &mut Device) {
    for index in [RX, TX] {
        device.ring_mut(index).renew_events().unwrap();
    }
}

/// Says everything of a ring, but does not enable it. Nothing is kicked.
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

/// The driver hears of the ten frames, and goes on.
fn expect_goes_on(rig: &mut Rig, device: &mut Device) {
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

fn a_driver_is_called_after_a_reconnect(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    for order in ORDERS {
        let mut device = waiting_device(&mut rig);
        reconnect(&mut rig, &mut device, order);
        expect_goes_on(&mut rig, &mut device);
    }
}

fn a_driver_is_called_by_the_next_back_end(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    for order in ORDERS {
        let mut device = waiting_device(&mut rig);
        rig.kill_backend().unwrap();
        rig.restart_backend().unwrap();
        reconnect(&mut rig, &mut device, order);
        expect_goes_on(&mut rig, &mut device);
    }
}

fn a_driver_is_called_when_its_rings_are_enabled_last(datapath: Datapath) {
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
        expect_goes_on(&mut rig, &mut device);
    }
}

fn a_driver_is_called_when_its_rings_are_enabled_again(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = waiting_device(&mut rig);
    for index in [RX, TX] {
        device.connection.set_vring_enable(index, false).unwrap();
    }
    for index in [RX, TX] {
        device.ring(index).take_calls().unwrap();
        device.connection.set_vring_enable(index, true).unwrap();
    }
    expect_goes_on(&mut rig, &mut device);
}

fn a_driver_is_called_when_its_rings_are_started_again(datapath: Datapath) {
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
        expect_goes_on(&mut rig, &mut device);
    }
}

fn a_driver_is_called_on_a_new_call_descriptor(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = waiting_device(&mut rig);
    lose_calls(&mut device);
    for index in [RX, TX] {
        let ring = device.ring(index);
        device.connection.set_vring_kick(index, Some(ring.kick.as_fd())).unwrap();
        device.connection.set_vring_call(index, Some(ring.call.as_fd())).unwrap();
    }
    expect_goes_on(&mut rig, &mut device);
}

/// A ring whose memory is gone is not started. A call descriptor that comes meanwhile is signalled when the ring runs again.
fn a_driver_is_called_when_the_memory_of_its_rings_returns(datapath: Datapath) {
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
    expect_goes_on(&mut rig, &mut device);
}

/// Both messages come at once, and stop the ring once.
fn a_call_that_is_due_outlasts_the_next_message(datapath: Datapath) {
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
    expect_goes_on(&mut rig, &mut device);
}

fn a_driver_is_called_once_and_not_for_each_message(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    for index in [RX, TX] {
        device.ring_mut(index).queue.disable_calls();
    }
    // All calls that are due have been made then.
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
