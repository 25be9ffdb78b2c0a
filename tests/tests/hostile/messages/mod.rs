//! A front-end that sends wrong messages, in the wrong order or in pieces.

mod cases;

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;

use baton_tests::datapath::Datapath;
use baton_tests::fake_frontend::wire::{Message, protocol, request};
use baton_tests::fake_frontend::{Connection, Device, Options};
use baton_tests::hostile::Victim;
use baton_tests::netns;
use baton_tests::on_both_datapaths;
use nix::sys::socket::{setsockopt, sockopt};

use self::cases::{CASES, eventfd, say_with};

on_both_datapaths! {
    back_end_survives_wrong_messages,
    back_end_survives_every_request_of_every_size,
    back_end_survives_a_socket_closed_at_any_point,
    surplus_descriptors_do_not_hold_up_the_back_end,
    lingering_close_does_not_hold_up_the_back_end,
}

/// The state of the connection when a case begins.
#[derive(Clone, Copy, Debug)]
enum Stage {
    /// Connected; no message sent.
    Fresh,
    /// Features negotiated.
    Negotiated,
    /// Serving frames.
    Running,
}
use Stage::{Fresh, Negotiated, Running};

fn options() -> Options {
    let protocol_features = protocol::MQ
        | protocol::REPLY_ACK
        | protocol::CONFIG
        | protocol::CONFIGURE_MEM_SLOTS
        | protocol::RESET_DEVICE;
    Options { protocol_features, ..Options::default() }
}

/// Waits until the back-end has processed all messages or closed the connection. Discards the other replies.
fn settle(connection: &Connection) {
    if connection.send(&Message::empty(request::GET_FEATURES), &[]).is_err() {
        return;
    }
    while let Ok(Some(reply)) = connection.try_receive() {
        if reply.request == request::GET_FEATURES {
            return;
        }
    }
}

/// Brings a device to a stage.
fn prepare(connection: Connection, stage: Stage) -> Device {
    let mut device = Device::new(connection, options()).unwrap();
    match stage {
        Fresh => {}
        Negotiated => device.negotiate().unwrap(),
        Running => {
            device.negotiate().unwrap();
            device.set_up().unwrap();
            device.fill_receive_rings().unwrap();
        }
    }
    // An attack does not wait for acknowledgements.
    device.connection.acknowledged = false;
    device
}

fn back_end_survives_wrong_messages(datapath: Datapath) {
    let mut victim = Victim::new(datapath).unwrap();
    for (name, stage, attack) in CASES {
        eprintln!("{name}");
        let mut device = prepare(victim.rig.backend.connect().unwrap(), *stage);
        attack(&mut device);
        victim.rig.inject(0..5, 100).unwrap();
        settle(&device.connection);
        drop(device);
        victim.check().unwrap_or_else(|error| panic!("{name}: {error:#}"));
    }
}

fn back_end_survives_every_request_of_every_size(datapath: Datapath) {
    let mut victim = Victim::new(datapath).unwrap();
    let event = eventfd();
    for request in (0..request::LAST + 10).chain([u32::MAX]) {
        for size in [0, 1, 4, 8, 12, 40, 4096] {
            for fds in [0, 1, 8] {
                let device = prepare(victim.rig.backend.connect().unwrap(), Negotiated);
                let message = Message::new(request, vec![0; size]).with_need_reply();
                say_with(&device, &message, &vec![event.as_fd(); fds]);
                // The connection ends when the back-end has read everything. The test does not judge the replies.
                device.connection.stream().shutdown(std::net::Shutdown::Write).unwrap();
                while let Ok(Some(_)) = device.connection.try_receive() {}
            }
        }
        victim.check().unwrap_or_else(|error| panic!("request {request}: {error:#}"));
    }
}

fn back_end_survives_a_socket_closed_at_any_point(datapath: Datapath) {
    let mut victim = Victim::new(datapath).unwrap();
    for cut in 0.. {
        let connection = victim.rig.backend.connect().unwrap();
        connection.cut_after.set(Some(cut));
        let mut device = Device::new(connection, options()).unwrap();
        let up = device.negotiate().and_then(|()| device.set_up()).and_then(|()| device.fill_receive_rings());
        drop(device);
        if cut % 50 == 0 || up.is_ok() {
            victim.check().unwrap_or_else(|error| panic!("closed after {cut} bytes: {error:#}"));
        }
        if up.is_ok() {
            assert!(cut > 400, "the device came up with {cut} bytes");
            break;
        }
    }
}

/// The `vhost` crate accepts 32 descriptors. If a message has more, it continues to read bytes that were not sent.
fn surplus_descriptors_do_not_hold_up_the_back_end(datapath: Datapath) {
    let mut victim = Victim::new(datapath).unwrap();
    let event = eventfd();
    for fds in [32, 33, 253] {
        for message in [Message::empty(request::SET_OWNER), Message::u64(request::SET_VRING_CALL, 0)] {
            let device = prepare(victim.rig.backend.connect().unwrap(), Negotiated);
            say_with(&device, &message, &vec![event.as_fd(); fds]);
            // The front-end sends nothing more, and the event loop serves others.
            victim.rig.backend.status().unwrap();
        }
    }
    victim.check().unwrap();
}

/// A front-end passes a TCP socket with `SO_LINGER` and unsent data. The last close of it waits until the data is sent
/// (socket(7)).
fn lingering_close_does_not_hold_up_the_back_end(datapath: Datapath) {
    let mut victim = Victim::new(datapath).unwrap();
    netns::set_up("lo").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let linger = libc::linger { l_onoff: 1, l_linger: 1000 };
    let messages = [request::SET_VRING_CALL, request::SET_FEATURES, request::SET_MEM_TABLE];
    // Without its body, the message and its descriptor stay in the front-end's socket.
    for (number, whole) in messages.into_iter().flat_map(|number| [(number, true), (number, false)]) {
        let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (silent, _) = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        while stream.write(&[0; 65536]).is_ok() {}
        setsockopt(&stream, sockopt::Linger, &linger).unwrap();
        let device = prepare(victim.rig.backend.connect().unwrap(), Negotiated);
        let message = Message::u64(number, 0).encode();
        // The back-end handles the message after the front-end has closed its descriptor, so its close is the last.
        let (header, body) = message.split_at(12);
        device.connection.send_bytes(header, &[stream.as_fd()]).unwrap();
        drop(stream);
        if whole {
            device.connection.send_bytes(body, &[]).unwrap();
        }
        device.connection.stream().shutdown(std::net::Shutdown::Write).unwrap();
        while let Ok(Some(_)) = device.connection.try_receive() {}
        victim.rig.backend.status().unwrap();
        drop(silent);
    }
    victim.check().unwrap();
}
