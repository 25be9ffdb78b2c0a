//! Replies and acknowledgements (vhost-user: "Communication" and "REPLY_ACK").
#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::os::fd::AsFd;

use baton_tests::backend::Rig;
use baton_tests::datapath::{self, Datapath};
use baton_tests::fake_frontend::wire::{Message, NEED_REPLY, REPLY, VERSION, protocol, request, u32_at};
use baton_tests::fake_frontend::{Connection, Device, Options, features};
use baton_tests::on_both_datapaths;
use nix::sys::eventfd::EventFd;

on_both_datapaths! {
    every_request_with_need_reply_gets_exactly_one_reply,
    query_with_need_reply_gets_only_its_answer,
    rejected_requests_are_never_acknowledged,
    acknowledgement_is_sent_after_the_effect,
    get_config_returns_the_requested_length,
    get_config_with_an_invalid_range_is_an_error,
    descriptor_sent_with_rem_mem_reg_is_closed,
    unknown_feature_bits_are_masked,
    only_supported_features_are_offered,
    reset_owner_leaves_the_session_usable,
    reset_device_stops_and_disables_all_rings,
    features_that_change_a_layout_are_refused_unless_offered,
    malformed_request_gets_one_negative_reply,
    every_request_gets_one_reply_whatever_it_carries,
}

/// A connection that has negotiated all that is offered, including `REPLY_ACK`.
fn negotiated(rig: &mut Rig) -> Connection {
    let mut connection = rig.backend.connect().unwrap();
    let offered = connection.get_features().unwrap();
    let protocol = connection.get_protocol_features().unwrap();
    connection.set_protocol_features(protocol).unwrap();
    connection.acknowledged = true;
    connection.set_owner().unwrap();
    connection.set_features(offered).unwrap();
    connection
}

fn every_request_with_need_reply_gets_exactly_one_reply(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let device = Device::new(negotiated(&mut rig), Options::default()).unwrap();
    let connection = &device.connection;
    let queue = &device.ring(0).queue;
    let addresses = queue.addresses();
    let [descriptors, used, available] = [addresses.descriptors, addresses.used, addresses.available]
        .map(|address| device.memory.user_address(address));
    let places: Vec<_> = device.memory.regions().iter().map(|region| region.place).collect();
    let files: Vec<_> = device.memory.regions().iter().map(|region| region.file()).collect();
    let event = EventFd::new().unwrap();
    let protocol = connection.get_protocol_features().unwrap();
    let messages = [
        (Message::u64(request::SET_PROTOCOL_FEATURES, protocol), vec![]),
        (Message::empty(request::SET_OWNER), vec![]),
        (Message::u64(request::SET_FEATURES, device.options.features), vec![]),
        (Message::memory_table(&places), files.clone()),
        (Message::vring_state(request::SET_VRING_NUM, 0, 256), vec![]),
        (Message::vring_state(request::SET_VRING_BASE, 0, 0), vec![]),
        (Message::vring_addresses(0, descriptors, used, available), vec![]),
        (Message::u64(request::SET_VRING_CALL, 0), vec![event.as_fd()]),
        (Message::u64(request::SET_VRING_KICK, 0), vec![event.as_fd()]),
        (Message::u64(request::SET_VRING_ERR, 0), vec![event.as_fd()]),
        (Message::vring_state(request::SET_VRING_ENABLE, 0, 1), vec![]),
        (Message::vring_state(request::SET_VRING_ENABLE, 0, 0), vec![]),
        (Message::empty(request::RESET_DEVICE), vec![]),
    ];
    for (message, fds) in messages {
        let answer = connection.acknowledge(&message, &fds).unwrap();
        assert_eq!(answer, 0, "{message:?}");
        // A second reply would arrive before this one.
        connection.get_features().unwrap();
        // Without NEED_REPLY there is no reply.
        connection.send(&message, &fds).unwrap();
        connection.get_features().unwrap();
    }
}

fn query_with_need_reply_gets_only_its_answer(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let connection = negotiated(&mut rig);
    let queries = [
        Message::empty(request::GET_FEATURES),
        Message::empty(request::GET_PROTOCOL_FEATURES),
        Message::empty(request::GET_QUEUE_NUM),
        Message::empty(request::GET_MAX_MEM_SLOTS),
        Message::get_config(0, 12),
        Message::vring_state(request::GET_VRING_BASE, 0, 0),
    ];
    for query in queries {
        let plain = connection.ask(&query).unwrap();
        connection.send(&query.clone().with_need_reply(), &[]).unwrap();
        let reply = connection.receive().unwrap();
        assert_eq!(reply.request, query.request);
        assert_eq!(reply.flags & !NEED_REPLY, VERSION | REPLY);
        assert_eq!(reply.payload, plain);
        connection.get_features().unwrap();
    }
}

/// Sends a request with `NEED_REPLY`; returns whether it is acknowledged. The back-end refuses it with a number other
/// than 0, or by closing the connection.
fn is_accepted(connection: &Connection, message: &Message) -> bool {
    connection.send(&message.clone().with_need_reply(), &[]).unwrap();
    connection.try_receive().unwrap().is_some_and(|reply| reply.payload == 0u64.to_le_bytes())
}

fn rejected_requests_are_never_acknowledged(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let bad = [
        Message::vring_state(request::SET_VRING_NUM, 0, 0),
        Message::vring_state(request::SET_VRING_NUM, 0, 3),
        Message::vring_state(request::SET_VRING_NUM, 0, 65_535),
        Message::vring_state(request::SET_VRING_NUM, 0, 65_536),
        Message::vring_state(request::SET_VRING_NUM, 0, 0x8000_0000),
        Message::vring_state(request::SET_VRING_NUM, 2, 256),
        Message::vring_state(request::SET_VRING_BASE, 2, 0),
        Message::vring_state(request::SET_VRING_BASE, 0, 65_536),
        Message::vring_state(request::SET_VRING_ENABLE, 2, 1),
        Message::vring_state(request::SET_VRING_ENABLE, 0, 2),
        Message::vring_state(request::SET_VRING_ENABLE, u32::MAX, 1),
        Message::vring_addresses(0, 1, 2, 4),
        Message::vring_addresses(2, 0x1000, 0x2000, 0x3000),
    ];
    for message in bad {
        let connection = negotiated(&mut rig);
        assert!(!is_accepted(&connection, &message), "{message:?} was acknowledged");
    }
    let connection = negotiated(&mut rig);
    assert!(is_accepted(&connection, &Message::vring_state(request::SET_VRING_NUM, 0, 32_768)));
    rig.backend.check_healthy().unwrap();
}

fn acknowledgement_is_sent_after_the_effect(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    for round in 0..100 {
        rig.inject(round * 10..(round + 1) * 10, 100).unwrap();
        device.connection.set_vring_enable(0, false).unwrap();
        let used = device.pairs[0].receive.queue.used_index();
        rig.worker_rounds(&mut device, 0).unwrap();
        assert_eq!(
            device.pairs[0].receive.queue.used_index(),
            used,
            "a frame was received after the ring was disabled"
        );
        device.connection.set_vring_enable(0, true).unwrap();
        rig.expect_in_guest(&mut device, round * 10..(round + 1) * 10).unwrap();
    }
}

fn get_config_returns_the_requested_length(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 3, &["--mac=02:12:34:56:78:9a", "--mtu=1400"]).unwrap();
    let connection = negotiated(&mut rig);
    let expected =
        [&[0x02, 0x12, 0x34, 0x56, 0x78, 0x9a][..], &[1, 0], &3u16.to_le_bytes(), &1400u16.to_le_bytes()]
            .concat();
    for length in 1..=12 {
        let config = connection.get_config(0, length).unwrap();
        assert_eq!(config, expected[..length as usize]);
    }
    assert_eq!(connection.get_config(10, 2).unwrap(), 1400u16.to_le_bytes());
    assert_eq!(connection.get_config(6, 1).unwrap(), [1]);
}

/// Whether `GET_CONFIG` with this range is an error: a reply without contents, or no reply.
fn config_is_refused(rig: &mut Rig, message: &Message) -> bool {
    let connection = negotiated(rig);
    connection.send(message, &[]).unwrap();
    match connection.try_receive().unwrap() {
        None => true,
        Some(reply) => reply.payload.is_empty() || u32_at(&reply.payload, 4) == Some(0),
    }
}

fn get_config_with_an_invalid_range_is_an_error(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    for message in [
        Message::get_config(0, 0),
        Message::get_config(4096, 4),
        Message::get_config(u32::MAX, 4),
        Message::get_config(0, 12).with_size(12),
    ] {
        assert!(config_is_refused(&mut rig, &message), "{message:?}");
    }
    assert!(!config_is_refused(&mut rig, &Message::get_config(0, 6)));
    rig.backend.check_healthy().unwrap();
}

fn descriptor_sent_with_rem_mem_reg_is_closed(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = Device::new(negotiated(&mut rig), Options::default()).unwrap();
    for region in device.memory.regions() {
        device.connection.add_memory_region(region).unwrap();
    }
    for index in [0, 1] {
        device.set_up_ring(index, 0).unwrap();
        device.connection.set_vring_enable(index, true).unwrap();
    }
    device.fill_receive_rings().unwrap();
    rig.check_traffic(&mut device).unwrap();
    device.wait_transmitted(0).unwrap();
    for index in [0, 1] {
        device.stop_ring(index).unwrap();
    }
    let before = rig.backend.process.open_fds().unwrap();
    for region in device.memory.regions() {
        let message = Message::single_region(request::REM_MEM_REG, &region.place);
        assert_eq!(device.connection.acknowledge(&message, &[region.file()]).unwrap(), 0);
        device.connection.add_memory_region(region).unwrap();
    }
    rig.backend.process.wait_open_fds(before).unwrap();
    // A removed region cannot be removed again.
    let region = &device.memory.regions()[0];
    device.connection.remove_memory_region(region).unwrap();
    let message = Message::single_region(request::REM_MEM_REG, &region.place);
    assert!(!is_accepted(&device.connection, &message));
}

fn unknown_feature_bits_are_masked(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut connection = rig.backend.connect().unwrap();
    let offered = connection.get_features().unwrap();
    let offered_protocol = connection.get_protocol_features().unwrap();
    // Newer versions of the specification define bits 20 to 23, and may define the others.
    connection.set_protocol_features(offered_protocol | 0xf0_0000 | 1 << 40).unwrap();
    connection.acknowledged = true;
    connection.set_owner().unwrap();
    connection.set_features(offered | 1 << 50 | 1 << 62).unwrap();
    let status = rig.backend.status().unwrap();
    assert_eq!(status.features, format!("{offered:#x}"));
    assert_eq!(status.protocol_features, format!("{offered_protocol:#x}"));
}

fn only_supported_features_are_offered(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let connection = rig.backend.connect().unwrap();
    let features = connection.get_features().unwrap();
    let expected = features::PROTOCOL_FEATURES
        | features::VERSION_1
        | features::MRG_RXBUF
        | features::CSUM
        | features::GUEST_CSUM
        | features::GUEST_TSO4
        | features::GUEST_TSO6
        | features::GUEST_ECN
        | features::HOST_TSO4
        | features::HOST_TSO6
        | features::HOST_ECN
        | features::EVENT_IDX
        | features::INDIRECT_DESC
        | features::MQ
        | features::STATUS
        | features::CTRL_VQ
        | features::GUEST_ANNOUNCE;
    assert_eq!(features & expected, expected, "{features:#x}");
    // Not every kernel's vhost-net offers IN_ORDER.
    assert!(datapath == Datapath::VhostNet || features & features::IN_ORDER != 0, "{features:#x}");
    // The operator has set neither a MAC address nor an MTU.
    assert_eq!(features & (features::MAC | features::MTU), 0, "{features:#x}");
    // No RARP, since the guest announces itself, and no feature that a hand-over of the session cannot carry.
    let protocol = connection.get_protocol_features().unwrap();
    let expected = protocol::MQ
        | protocol::LOG_SHMFD
        | protocol::REPLY_ACK
        | protocol::CONFIG
        | protocol::RESET_DEVICE
        | protocol::CONFIGURE_MEM_SLOTS
        | protocol::DEVICE_STATE
        | datapath::protocol_features(datapath);
    assert_eq!(protocol, expected, "{protocol:#x}");
}

fn reset_owner_leaves_the_session_usable(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let mut device = rig.device(Options::default()).unwrap();
    rig.check_traffic(&mut device).unwrap();
    device.connection.send(&Message::empty(request::RESET_OWNER), &[]).unwrap();
    for index in [0, 1] {
        device.connection.set_vring_enable(index, true).unwrap();
    }
    rig.check_traffic(&mut device).unwrap();
}

fn reset_device_stops_and_disables_all_rings(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let options = Options {
        protocol_features: Options::default().protocol_features | protocol::RESET_DEVICE,
        ..Options::default()
    };
    let mut device = rig.device(options.clone()).unwrap();
    rig.check_traffic(&mut device).unwrap();
    device.wait_transmitted(0).unwrap();
    device.connection.tell(&Message::empty(request::RESET_DEVICE), &[]).unwrap();
    let before = device.memory.snapshot();
    let vrings = rig.backend.status().unwrap().vrings;
    assert!(vrings.iter().all(|vring| !vring.started && !vring.enabled), "{vrings:?}");
    rig.inject(0..5, 100).unwrap();
    for index in [0, 1] {
        device.ring(index).kick().unwrap();
    }
    device.connection.get_features().unwrap();
    assert!(device.memory.snapshot() == before, "guest memory was written after a reset");

    // The driver sets up the device again, on the same connection.
    let Device { connection, .. } = device;
    let mut device = Device::new(connection, options).unwrap();
    device.connection.set_features(device.options.features).unwrap();
    device.set_up().unwrap();
    device.fill_receive_rings().unwrap();
    rig.expect_in_guest(&mut device, 0..5).unwrap();
    rig.check_traffic(&mut device).unwrap();
}

fn features_that_change_a_layout_are_refused_unless_offered(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    // ACCESS_PLATFORM, RING_PACKED and HASH_REPORT.
    for bit in [33, 34, 57] {
        let connection = negotiated(&mut rig);
        let offered = connection.get_features().unwrap();
        assert_eq!(offered & 1 << bit, 0);
        let message = Message::u64(request::SET_FEATURES, offered | 1 << bit);
        assert!(!is_accepted(&connection, &message), "feature {bit} was acknowledged");
    }
    rig.backend.check_healthy().unwrap();
}

fn malformed_request_gets_one_negative_reply(datapath: Datapath) {
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    // SET_CONFIG whose size differs from its payload's, SET_BACKEND_REQ_FD and GPU_SET_SOCKET without a descriptor.
    let config = [0u32, 8, 0, 0].map(u32::to_le_bytes).concat();
    let requests = [Message::new(25, config), Message::empty(21), Message::empty(33)];
    for (message, backend_req) in requests.into_iter().flat_map(|m| [(m.clone(), 0), (m, 1 << 5)]) {
        let connection = negotiated(&mut rig);
        let protocol = connection.get_protocol_features().unwrap();
        connection.set_protocol_features(protocol | backend_req).unwrap();
        connection.send(&message.clone().with_need_reply(), &[]).unwrap();
        let mut replies = Vec::new();
        while let Ok(Some(reply)) = connection.try_receive() {
            replies.push(reply.payload);
        }
        assert_eq!(replies, [1u64.to_le_bytes().to_vec()], "{message:?}");
    }
    rig.backend.check_healthy().unwrap();
}

fn every_request_gets_one_reply_whatever_it_carries(datapath: Datapath) {
    // These have their own answers. SET_PROTOCOL_FEATURES (16) is left out, too: it may withdraw REPLY_ACK.
    const QUERIES: [u32; 12] = [1, 6, 11, 15, 17, 24, 28, 31, 36, 40, 41, 44];
    let mut rig = Rig::new(datapath, 1, &[]).unwrap();
    let event = EventFd::new().unwrap();
    let config = [0u32, 8, 0, 0, 0].map(u32::to_le_bytes).concat();
    for number in (2..=44).filter(|number| *number != 16 && !QUERIES.contains(number)) {
        for body in [vec![], vec![0; 8], config.clone()] {
            for fds in [vec![], vec![event.as_fd()]] {
                let connection = negotiated(&mut rig);
                let message = Message::new(number, body.clone()).with_need_reply();
                connection.send(&message, &fds).unwrap();
                // Fails if the session has ended.
                let _ = connection.send(&Message::empty(request::GET_FEATURES), &[]);
                let mut replies = 0;
                while let Ok(Some(reply)) = connection.try_receive()
                    && reply.request != request::GET_FEATURES
                {
                    replies += 1;
                }
                assert_eq!(replies, 1, "{message:?} with {} descriptors", fds.len());
            }
        }
    }
    rig.backend.check_healthy().unwrap();
}
