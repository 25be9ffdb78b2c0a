//! The rings of source and target, and the frames in flight, when the device is handed over.

use std::time::Instant;

use anyhow::{Result, ensure};
use baton_protocol::control::{BackendState, HandoverState};
use baton_tests::backend::{Backend, Rig, TAP};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::net::{GSO_TCPV4, NetHeader, features};
use baton_tests::fake_frontend::{Device, Options};
use baton_tests::frames::{self, Network, Transport, segment};
use baton_tests::netns;
use baton_tests::on_both_datapaths;
use baton_tests::process::PATIENCE;

use super::{armed, expect_exit, flow, offered, options, take};

on_both_datapaths! {
    first_ring_of_the_target_takes_the_device,
    rings_that_start_before_the_offer_wait_for_the_device,
    rings_started_early_continue_where_the_source_stops,
    no_frame_is_lost_doubled_or_reordered_over_many_hops,
    device_can_be_handed_over_after_the_source_restarts_its_rings,
}

fn first_ring_of_the_target_takes_the_device(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, mut target) = offered(datapath, 4)?;
    let status = target.status()?;
    ensure!(status.state == BackendState::Waiting && status.tap.is_empty(), "{status:?}");
    ensure!(rig.backend.status()?.state == BackendState::HandingOver);
    // Frames that arrive now wait in the TAP, in whichever queue the kernel chooses.
    let flows: Vec<_> = (2000..2032).map(flow).collect();
    for frame in &flows {
        rig.network.send(frame)?;
    }

    let mut source_connection = device.move_to(target.connect()?)?;
    rig.backend.wait_handover(HandoverState::HandedOver)?;
    let mut received = Vec::new();
    for _ in &flows {
        received.push(rig.receive_on_any(&mut device)?.1);
    }
    received.sort();
    ensure!(received == flows, "the guest received other frames");
    let mut source = std::mem::replace(&mut rig.backend, target);
    rig.check_traffic(&mut device)?;

    // A ring that the source's front-end starts now moves no frames.
    device.suspend()?;
    std::mem::swap(&mut device.connection, &mut source_connection);
    device.restart_rings()?;
    source.wait_started(0)?;
    device.suspend()?;
    std::mem::swap(&mut device.connection, &mut source_connection);
    device.restart_rings()?;
    rig.check_traffic(&mut device)?;
    let status = rig.backend.status()?;
    ensure!((status.state, status.tap.as_str(), status.queue_pairs) == (BackendState::Serving, TAP, 4));
    ensure!(source.status()?.state == BackendState::HandedOver);
    // The source runs for as long as its front-end stays.
    ensure!(source.process.is_running()?);
    drop(source_connection);
    expect_exit(&mut source)?;
    rig.check_traffic(&mut device)?;
    rig.backend.check_healthy()
}

fn rings_that_start_before_the_offer_wait_for_the_device(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, mut target) = armed(datapath, 2)?;
    // One ring of the source still runs, so the source is not suspended.
    for index in 0..3 {
        device.stop_ring(index)?;
    }
    let frame = frames::numbered(6, 100);
    rig.network.send(&frame)?;
    let source_connection = device.move_to(target.connect()?)?;
    for index in 0..4 {
        target.wait_started(index)?;
        // The target may have called the driver when the call descriptor of a used ring was set.
        device.ring(index).take_calls()?;
    }
    ensure!(target.status()?.tap.is_empty());
    ensure!(rig.backend.status()?.state == BackendState::Serving);
    source_connection.get_vring_base(3)?;
    rig.backend.wait_handover(HandoverState::HandedOver)?;
    rig.backend = target;
    // The target calls every driver, whether or not it has used a buffer.
    for index in 0..4 {
        let called = device.ring(index).wait_call(Instant::now() + PATIENCE)?;
        ensure!(called, "vring {index} was not called when the device was taken");
    }
    let (_, received) = rig.receive_on_any(&mut device)?;
    ensure!(received == frame, "the guest received another frame");
    rig.check_traffic(&mut device)
}

/// The source determines the place of such a ring until it stops. The used index that the target saw first is outdated.
fn rings_started_early_continue_where_the_source_stops(datapath: Datapath) -> Result<()> {
    for restarted in [false, true] {
        let (mut rig, mut device, mut target) = armed(datapath, 1)?;
        let mut other = target.connect()?;
        std::mem::swap(&mut device.connection, &mut other);
        device.negotiate()?;
        device.connection.set_memory_table(&device.memory)?;
        for index in 0..2 {
            device.connection.set_vring_enable(index, true)?;
            device.set_up_ring(index, device.ring(index).queue.used_index())?;
        }
        std::mem::swap(&mut device.connection, &mut other);
        for _ in 0..20 {
            rig.check_traffic(&mut device)?;
        }
        if restarted {
            // As when the VM stops and starts: each ring gets the base that the target returned.
            std::mem::swap(&mut device.connection, &mut other);
            for index in 0..2 {
                let base = device.stop_ring(index)?;
                device.set_up_ring(index, base)?;
            }
            std::mem::swap(&mut device.connection, &mut other);
            for _ in 0..20 {
                rig.check_traffic(&mut device)?;
            }
        }
        device.suspend()?;
        rig.backend.wait_handover(HandoverState::HandedOver)?;
        std::mem::swap(&mut device.connection, &mut other);
        rig.backend = target;
        for _ in 0..20 {
            rig.check_traffic(&mut device)?;
        }
        device.wait_transmitted(0)?;
        for index in 0..2 {
            ensure!(device.stop_ring(index)? == device.ring(index).queue.used_index());
        }
    }
    Ok(())
}

fn no_frame_is_lost_doubled_or_reordered_over_many_hops(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, mut target) = armed(datapath, 1)?;
    let mut next = 0;
    for _ in 0..10 {
        // Frames arrive before the stop, while no process serves the device, and afterwards.
        rig.inject(next..next + 40, 100)?;
        device.suspend()?;
        rig.inject(next + 40..next + 80, 1400)?;
        target.wait_handover(HandoverState::Adopted)?;
        for number in next..next + 40 {
            ensure!(device.enqueue(0, &NetHeader::default(), &frames::numbered(number, 90))?);
        }
        device.pairs[0].transmit.queue.publish();
        let mut source = take(&mut rig, &mut device, target)?;
        rig.inject(next + 80..next + 120, 300)?;
        rig.expect_in_guest(&mut device, next..next + 120)?;
        rig.expect_on_network(next..next + 40)?;
        expect_exit(&mut source)?;
        next += 120;
        target = Backend::waiting(datapath, &[])?;
        rig.backend.arm(&target.incoming())?;
    }
    let dropped = netns::counters(TAP)?.tx_dropped;
    ensure!(dropped == 0, "the TAP dropped {dropped} frames");
    rig.backend.check_healthy()
}

fn device_can_be_handed_over_after_the_source_restarts_its_rings(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device, mut target) = offered(datapath, 2)?;
    for epoch in 1..4 {
        rig.network.send(&frames::numbered(epoch, 300))?;
        device.restart_rings()?;
        let (_, received) = rig.receive_on_any(&mut device)?;
        ensure!(frames::number_of(&received) == Some(epoch));
        rig.check_traffic(&mut device)?;
        ensure!(rig.backend.wait_handover(HandoverState::Armed)?.epoch == Some(u64::from(epoch)));
        target.wait_handover(HandoverState::Ready)?;
        ensure!(target.status()?.tap.is_empty());
        device.suspend()?;
        target.wait_handover(HandoverState::Adopted)?;
    }
    let mut source = take(&mut rig, &mut device, target)?;
    rig.check_traffic(&mut device)?;
    expect_exit(&mut source)
}

#[test]
fn frame_in_hand_is_delivered_first() {
    let mut rig = Rig::new(Datapath::Userspace, 1, &[]).unwrap();
    let options = Options {
        features: options(1).features | features::GUEST_CSUM | features::GUEST_TSO4,
        receive_pieces: vec![2048],
        ..options(1)
    };
    let mut device = Device::new(rig.backend.connect().unwrap(), options).unwrap();
    device.negotiate().unwrap();
    device.set_up().unwrap();
    // One buffer, which is too small for the large frame.
    device.post_receive_buffers(0, 1).unwrap();
    device.ring(0).kick().unwrap();
    rig.network.send(&frames::numbered(1, 1400)).unwrap();
    rig.expect_in_guest(&mut device, 1..2).unwrap();
    // The driver has posted the buffer again.
    let large = segment(Network::V4, Transport::Tcp, &vec![7; 9000]);
    let header = large.header(GSO_TCPV4, 1400);
    rig.network.send_with(&header, &large.bytes).unwrap();
    rig.network.send(&frames::numbered(2, 100)).unwrap();

    let mut target = Backend::waiting(Datapath::Userspace, &[]).unwrap();
    rig.worker_rounds(&mut device, 0).unwrap();
    rig.backend.arm(&target.incoming()).unwrap();
    device.suspend().unwrap();
    target.wait_handover(HandoverState::Adopted).unwrap();
    rig.backend.wait_handover(HandoverState::Offered).unwrap();
    let mut source = take(&mut rig, &mut device, target).unwrap();
    expect_exit(&mut source).unwrap();
    device.post_receive_buffers(0, usize::MAX).unwrap();
    device.ring(0).kick().unwrap();
    let (_, first) = device.receive(0).unwrap();
    assert_eq!(first.len(), large.bytes.len());
    rig.expect_in_guest(&mut device, 2..3).unwrap();
    // Each frame is counted once, by the source or by the target.
    rig.backend.wait_pair_stats(0, |stats| stats.rx.frames == Some(3)).unwrap();
}
