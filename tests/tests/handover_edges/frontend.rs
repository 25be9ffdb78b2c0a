//! What the front-end does during a hand-over: sends messages, or leaves.

use anyhow::{Result, ensure};
use baton_protocol::control::HandoverState;
use baton_tests::backend::{Backend, Rig};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::wire::{Message, request};
use baton_tests::fake_frontend::{Device, Options};
use baton_tests::on_both_datapaths;
use baton_tests::session_peer::STAGED;

use super::{Held, serving};

on_both_datapaths! {
    messages_sent_during_a_hand_over_are_answered_by_the_final_owner,
    final_owner_notices_a_front_end_that_leaves_during_the_hand_over,
}

/// Sends several requests at once, the last of which stop the device.
fn send_requests(device: &Device) -> Result<()> {
    let requests = [
        Message::empty(request::GET_FEATURES),
        Message::vring_state(request::SET_VRING_ENABLE, 0, 0).with_need_reply(),
        Message::vring_state(request::SET_VRING_ENABLE, 1, 0).with_need_reply(),
        Message::empty(request::GET_PROTOCOL_FEATURES),
        Message::vring_state(request::GET_VRING_BASE, 0, 0),
        Message::vring_state(request::GET_VRING_BASE, 1, 0),
    ];
    for message in &requests {
        device.connection.send(message, &[])?;
    }
    Ok(())
}

/// Expects the replies to these, in order.
fn expect_replies(device: &Device) -> Result<()> {
    let mut payloads = Vec::new();
    for expected in [
        request::GET_FEATURES,
        request::SET_VRING_ENABLE,
        request::SET_VRING_ENABLE,
        request::GET_PROTOCOL_FEATURES,
        request::GET_VRING_BASE,
        request::GET_VRING_BASE,
    ] {
        let reply = device.connection.receive()?;
        ensure!(reply.request == expected, "{reply:?} instead of an answer to {expected}");
        payloads.push(reply.payload);
    }
    ensure!(payloads[1] == [0; 8] && payloads[2] == [0; 8], "{payloads:?}");
    // The bases are the used indices that the driver sees, since the device is stopped.
    for (index, payload) in [0, 1].into_iter().zip(&payloads[4..]) {
        let used = device.ring(index).queue.used_index().to_le_bytes();
        ensure!(payload[4..6] == used, "vring {index}: {payload:?} instead of {used:?}");
    }
    Ok(())
}

fn messages_sent_during_a_hand_over_are_answered_by_the_final_owner(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device) = serving(datapath, Options::default(), &[])?;
    // If the hand-over is cancelled, the source answers.
    let held = Held::staged(&rig)?;
    send_requests(&device)?;
    rig.backend.status()?;
    device.connection.check_quiet()?;
    ensure!(rig.backend.cancel()? == serde_json::json!({"result": "cancelled"}));
    expect_replies(&device)?;
    ensure!(held.asked.failure()? == ("stage".to_owned(), "cancelled".to_owned()));
    device.restart_rings()?;
    rig.check_traffic(&mut device)?;

    // If it completes, the target answers.
    let held = Held::staged(&rig)?;
    send_requests(&device)?;
    // Gives the source time to answer.
    for _ in 0..20 {
        ensure!(rig.backend.status()?.handover.is_some_and(|live| live.state == HandoverState::Staging));
    }
    device.connection.check_quiet()?;
    held.complete(&mut rig)?;
    expect_replies(&device)?;
    device.restart_rings()?;
    rig.check_traffic(&mut device)?;
    rig.backend.check_healthy()
}

fn final_owner_notices_a_front_end_that_leaves_during_the_hand_over(datapath: Datapath) -> Result<()> {
    let mut rig = Rig::new(datapath, 1, &[])?;
    for when in 0..4 {
        let mut device = rig.device(Options::default())?;
        rig.check_traffic(&mut device)?;
        let held = Held::begin(&rig, Backend::waiting_for_session(datapath, &[])?)?;
        match when {
            // The source still notices, and hands over the device without a front-end.
            0 => {
                held.relay.down()?;
                drop(device);
                rig.backend.fds_at_rest()?;
                for name in [held.relay.up()?, held.relay.down()?, held.relay.up()?] {
                    ensure!(["HELLO", "PREPARE", "READY"].contains(&name), "{name}");
                }
                for name in [held.relay.down()?, held.relay.up()?] {
                    ensure!(["STAGE", "STAGED"].contains(&name), "{name}");
                }
            }
            1 => {
                held.relay.until_ready()?;
                let sent = baton_tests::session_peer::hear_stage(&held.relay.source)?;
                drop(device);
                baton_tests::session_peer::send_stage(&held.relay.target, &sent)?;
                held.relay.up()?;
            }
            2 => {
                held.relay.until_staged()?;
                drop(device);
                held.relay.source.say(&STAGED)?;
            }
            _ => {
                held.relay.until_staged()?;
                held.relay.source.say(&STAGED)?;
                let (commit, _) = held.relay.source.hear()?;
                drop(device);
                held.relay.target.say(&commit)?;
            }
        }
        if when < 3 {
            ensure!(held.relay.down()? == "COMMIT");
        }
        ensure!(held.relay.up()? == "ACTIVE");
        held.succeed(&mut rig)?;
        rig.backend.fds_at_rest()?;
        rig.backend.check_healthy()?;
    }
    // The source notices, too, if it keeps the session.
    let mut device = rig.device(Options::default())?;
    rig.check_traffic(&mut device)?;
    let held = Held::staged(&rig)?;
    drop(device);
    drop(held.relay);
    held.asked.failure()?;
    rig.backend.fds_at_rest()?;
    let mut device = rig.device(Options::default())?;
    rig.check_traffic(&mut device)
}
