//! A source that the operator has armed hands its device to another back-end when the front-end stops the rings: the
//! target takes it, or the source takes it back, or it is refused or cancelled, or a process dies.

mod owners;
mod peers;
mod refusal;
mod rings;

use anyhow::{Result, ensure};
use baton_protocol::control::HandoverState;
use baton_tests::backend::{Backend, Rig};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::net::features;
use baton_tests::fake_frontend::{Device, Options};
use baton_tests::frames::{Network, Transport, segment};

fn options(queue_pairs: u16) -> Options {
    let features = Options::default().features | features::MQ;
    Options { queue_pairs, features, ..Options::default() }
}

/// A frame of the UDP flow with this source port.
fn flow(port: u16) -> Vec<u8> {
    let mut frame = segment(Network::V4, Transport::Udp, b"flow");
    let place = frame.transport_offset;
    frame.bytes[place..place + 2].copy_from_slice(&port.to_be_bytes());
    frame.bytes
}

/// A device whose traffic works, with a source that is armed to hand it to a waiting target.
fn armed(datapath: Datapath, queue_pairs: u16) -> Result<(Rig, Device, Backend)> {
    let mut rig = Rig::new(datapath, queue_pairs, &[])?;
    let mut device = rig.device(options(queue_pairs))?;
    rig.check_traffic(&mut device)?;
    let target = Backend::waiting(datapath, &[])?;
    let answer = rig.backend.arm(&target.incoming())?;
    ensure!(answer == serde_json::json!({"result": "armed"}), "{answer}");
    Ok((rig, device, target))
}

/// The same, after the front-end has stopped the rings and the source has offered the device.
fn offered(datapath: Datapath, queue_pairs: u16) -> Result<(Rig, Device, Backend)> {
    let (mut rig, device, mut target) = armed(datapath, queue_pairs)?;
    device.suspend()?;
    target.wait_handover(HandoverState::Adopted)?;
    rig.backend.wait_handover(HandoverState::Offered)?;
    Ok((rig, device, target))
}

/// Moves the device to the target, which becomes the rig's back-end; returns the source, whose front-end has left.
fn take(rig: &mut Rig, device: &mut Device, mut target: Backend) -> Result<Backend> {
    let source_connection = device.move_to(target.connect()?)?;
    rig.backend.wait_handover(HandoverState::HandedOver)?;
    drop(source_connection);
    Ok(std::mem::replace(&mut rig.backend, target))
}

fn expect_exit(backend: &mut Backend) -> Result<()> {
    let status = backend.process.wait()?;
    ensure!(status.code() == Some(0), "{status}; log:\n{}", backend.process.log());
    Ok(())
}
