//! What the front-end does during a hand-over: sends messages, or leaves.

use anyhow::{Result, ensure};
use baton_protocol::control::HandoverState;
use baton_tests::backend::{Backend, Rig};
use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::wire::{Message as Said, request};
use baton_tests::fake_frontend::{Device, Options};
use baton_tests::on_both_datapaths;
use baton_tests::session_peer::STAGED;

use super::{Held, serving};

on_both_datapaths! {
    what_the_front_end_says_meanwhile_the_target_answers,
    a_front_end_that_leaves_on_the_way_is_missed_by_whoever_has_the_session,
}

/// Several requests at once, of which the last stop the device.
fn say_a_lot(device: &Device) -> Result<()> {
    let said = [
        Said::empty(request::GET_FEATURES),
        Said::vring_state(request::SET_VRING_ENABLE, 0, 0).with_need_reply(),
        Said::vring_state(request::SET_VRING_ENABLE, 1, 0).with_need_reply(),
        Said::empty(request::GET_PROTOCOL_FEATURES),
        Said::vring_state(request::GET_VRING_BASE, 0, 0),
        Said::vring_state(request::GET_VRING_BASE, 1, 0),
    ];
    for message in &said {
        device.connection.send(message, &[])?;
    }
    Ok(())
}

/// The answers to these, in their order.
fn hear_a_lot(device: &Device) -> Result<()> {
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
    // Where the driver has seen them used, for the device stood still.
    for (index, payload) in [0, 1].into_iter().zip(&payloads[4..]) {
        let used = device.ring(index).queue.used_index().to_le_bytes();
        ensure!(payload[4..6] == used, "vring {index}: {payload:?} instead of {used:?}");
    }
    Ok(())
}

fn what_the_front_end_says_meanwhile_the_target_answers(datapath: Datapath) -> Result<()> {
    let (mut rig, mut device) = serving(datapath, Options::default(), &[])?;
    // Where nothing comes of it, the source answers.
    let held = Held::staged(&rig)?;
    say_a_lot(&device)?;
    rig.backend.status()?;
    device.connection.check_quiet()?;
    ensure!(rig.backend.cancel()? == serde_json::json!({"result": "cancelled"}));
    hear_a_lot(&device)?;
    ensure!(held.asked.failure()? == ("stage".to_owned(), "cancelled".to_owned()));
    device.restart_rings()?;
    rig.check_traffic(&mut device)?;

    // Else the target.
    let held = Held::staged(&rig)?;
    say_a_lot(&device)?;
    // The source has had every opportunity to answer.
    for _ in 0..20 {
        ensure!(rig.backend.status()?.handover.is_some_and(|live| live.state == HandoverState::Staging));
    }
    device.connection.check_quiet()?;
    held.complete(&mut rig)?;
    hear_a_lot(&device)?;
    device.restart_rings()?;
    rig.check_traffic(&mut device)?;
    rig.backend.check_healthy()
}

fn a_front_end_that_leaves_on_the_way_is_missed_by_whoever_has_the_session(datapath: Datapath) -> Result<()> {
    let mut rig = Rig::new(datapath, 1, &[])?;
    for when in 0..4 {
        let mut device = rig.device(Options::default())?;
        rig.check_traffic(&mut device)?;
        let held = Held::begin(&rig, Backend::waiting_for_session(datapath, &[])?)?;
        match when {
            // The source hears it still, and hands over what there is then.
            0 => {
                held.relay.down()?;
                drop(device);
                rig.backend.fds_at_rest()?;
                for said in [held.relay.up()?, held.relay.down()?, held.relay.up()?] {
                    ensure!(["HELLO", "PREPARE", "READY"].contains(&said), "{said}");
                }
                for said in [held.relay.down()?, held.relay.up()?] {
                    ensure!(["STAGE", "STAGED"].contains(&said), "{said}");
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
    // And where the source keeps it.
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
