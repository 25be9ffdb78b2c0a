//! The packets of a device's hand-over, and what a target refuses of them.

use baton_protocol::codec::Message as _;
use baton_protocol::fd_manifest::FdManifest;
use baton_protocol::handover::device::validate::{Capabilities, CheckedDevice, check_without_tap};
use baton_protocol::handover::wire::device::{
    Datapath, DeviceState, DirectionCounters, FrameExtent, Place, QueuePairState,
};
use baton_protocol::handover::wire::message::{
    FRAMES_FD, Hello, LINK_FD, Message, OWNERSHIP_FD, OfOffer, Offer, Prepare, ReadyToTake, Refuse,
    StateOnly, tap_fd,
};
use baton_protocol::reasons::{Reason, Reasons};

use super::{check_decoded, check_encoded};

const PLACE: Place = Place { net: 4_026_531_840, mnt: 4_026_531_841, root: (1, 2) };

fn device() -> DeviceState {
    let counters = |first| DirectionCounters {
        frames: first,
        bytes: first + 1,
        large_frames: first + 2,
        largest_frame: first + 3,
        dropped: first + 4,
        discarded: first + 5,
        kicks: first + 6,
        calls: first + 7,
    };
    let pair = QueuePairState {
        using_vnet_hdr: true,
        has_ufo: true,
        has_uso: false,
        has_tunnel: false,
        enabled: true,
        host_vnet_hdr_len: 12,
        frame_in_hand: Some(FrameExtent { offset: 0, length: 70 }),
        rx: counters(100),
        tx: counters(1 << 40),
    };
    DeviceState {
        tap: "tap0".to_owned(),
        queue_pairs: vec![pair, QueuePairState { enabled: false, frame_in_hand: None, ..pair }],
        features: 0x1_7000_0000,
        protocol_features: 0x8_0009,
        mac: Some([2, 0, 0, 0, 0, 1]),
        mtu: Some(1500),
        sndbuf: Some(0),
        downscript: Some("/etc/down".to_owned()),
        downscript_place: None,
        datapath: Datapath::VhostNet,
        poll_us: 50,
        poll_auto: false,
    }
}

/// Every message, with the name of its file.
fn messages() -> Vec<(&'static str, Message)> {
    let hello = Hello {
        purpose: "device".to_owned(),
        program: "baton-backend 0.1.0".to_owned(),
        dry_run: true,
        wants_vhost: false,
    };
    // As version 1 first worded them: a text may change, the golden file does not.
    let reason = |name: &str, text: &str| Reason { name: name.to_owned(), text: text.to_owned() };
    let reasons = Reasons(vec![
        reason("busy", "the target is in another hand-over"),
        reason(
            "features",
            "negotiated features 0x10 are not the target's; use a target with the same datapath and version",
        ),
    ]);
    let names =
        [tap_fd(0), tap_fd(1)].into_iter().chain([OWNERSHIP_FD, FRAMES_FD, LINK_FD].map(str::to_owned));
    let of_offer = OfOffer { epoch: 0x0102_0304_0506 };
    vec![
        ("hello", Message::Hello(hello)),
        ("refuse", Message::Refuse(Refuse { reasons })),
        ("prepare", Message::Prepare(Prepare { device: device(), session: None })),
        ("ready", Message::Ready(ReadyToTake {})),
        ("offer", Message::Offer(Offer { epoch: 7, device: device(), fds: FdManifest::new(names) })),
        ("adopted", Message::Adopted(of_offer)),
        ("taken", Message::Taken(of_offer)),
        ("retract", Message::Retract(of_offer)),
        ("device", Message::Device(StateOnly { device: device() })),
    ]
}

#[test]
fn every_packet_is_written_as_it_was() {
    check_encoded("handover", &messages());
}

#[test]
fn every_packet_of_every_version_so_far_is_read() {
    check_decoded("handover", &messages());
}

#[test]
fn the_place_of_a_downscript_goes_along() {
    let device = DeviceState { downscript_place: Some(PLACE), ..device() };
    let message = Message::Device(StateOnly { device });
    assert_eq!(Message::decode(&message.encode().unwrap()).unwrap(), message);
}

#[test]
fn adaptive_polling_goes_along() {
    let device = DeviceState { poll_us: 0, poll_auto: true, ..device() };
    let message = Message::Device(StateOnly { device });
    assert_eq!(Message::decode(&message.encode().unwrap()).unwrap(), message);
}

#[test]
fn state_alone_needs_nothing_but_features_and_may_have_more() {
    let body = b"\x81\xa6device\x82\xa8features\x07\xa5later\xc3";
    let mut packet = b"BATH\x01\0\x01\0\x09\0\0\0".to_vec();
    packet.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
    packet.extend(body);
    let Message::Device(StateOnly { device }) = Message::decode(&packet).unwrap() else {
        panic!("another message")
    };
    assert_eq!(device, DeviceState { features: 7, ..DeviceState::default() });
    check_without_tap(&device, 0xf).unwrap();
    check_without_tap(&device, 3).unwrap_err();
    // With a TAP that is not enough.
    let reasons = CheckedDevice::try_from((device, &target())).unwrap_err();
    let names: Vec<_> = reasons.0.iter().map(|reason| reason.name.as_str()).collect();
    assert_eq!(names, ["queue-pair-range", "tap-name"]);
}

#[test]
fn the_largest_device_fits_into_a_packet() {
    let mut device = device();
    let mut pair = device.queue_pairs[0];
    for counters in [&mut pair.rx, &mut pair.tx] {
        let most = u64::MAX;
        *counters = DirectionCounters {
            frames: most,
            bytes: most,
            large_frames: most,
            largest_frame: most,
            dropped: most,
            discarded: most,
            kicks: most,
            calls: most,
        };
    }
    pair.frame_in_hand = Some(FrameExtent { offset: u64::MAX, length: u32::MAX });
    device.queue_pairs = vec![pair; 128];
    device.downscript = Some(format!("/{}", "x".repeat(4095)));
    let fds =
        FdManifest::new((0..128).map(tap_fd).chain([OWNERSHIP_FD, FRAMES_FD, LINK_FD].map(str::to_owned)));
    Message::Offer(Offer { epoch: u64::MAX, device, fds }).encode().unwrap();
}

fn target() -> Capabilities {
    Capabilities {
        features: u64::MAX,
        protocol_features: u64::MAX,
        same_user: true,
        place: Some(PLACE),
        ..Capabilities::default()
    }
}

#[test]
fn each_thing_that_is_wrong_has_its_name() {
    type Case = (&'static str, fn(&mut DeviceState, &mut Capabilities));
    let cases: [Case; 28] = [
        ("", |_, _| {}),
        ("queue-pair-range", |device, _| device.queue_pairs.clear()),
        ("queue-pair-range", |device, _| {
            device.queue_pairs = vec![QueuePairState { frame_in_hand: None, ..device.queue_pairs[0] }; 129];
        }),
        ("queue-pairs", |_, target| target.queue_pairs = Some(3)),
        ("queue-pairs", |_, target| target.set_up_pairs = 3),
        ("vhost-fds", |_, target| target.vhost_fds = Some(1)),
        ("features", |_, target| target.features = 0x1_0000_0000),
        ("front-end-features", |_, target| {
            target.features = 0x1_7000_0000;
            target.acknowledged = 0x20;
        }),
        ("protocol-features", |_, target| target.protocol_features = 9),
        ("vnet-hdr", |device, _| device.queue_pairs[1].using_vnet_hdr = false),
        ("header-size", |device, _| {
            device.queue_pairs.iter_mut().for_each(|pair| pair.host_vnet_hdr_len = 20);
        }),
        ("mixed-queues", |device, _| device.queue_pairs[1].host_vnet_hdr_len = 10),
        ("mixed-queues", |device, _| device.queue_pairs[1].has_ufo = false),
        ("tap-name", |device, _| device.tap.clear()),
        ("tap-name", |device, _| device.tap = "a/b".to_owned()),
        ("mac", |device, _| device.mac = Some([3, 0, 0, 0, 0, 1])),
        ("mtu", |device, _| device.mtu = Some(67)),
        ("downscript", |device, _| device.downscript = Some("down".to_owned())),
        ("downscript-user", |_, target| target.same_user = false),
        ("", |device, _| device.downscript_place = Some(PLACE)),
        ("downscript-place", |device, _| device.downscript_place = Some(Place { net: 8, ..PLACE })),
        ("downscript-place", |device, _| device.downscript_place = Some(Place { mnt: 8, ..PLACE })),
        ("downscript-place", |device, _| device.downscript_place = Some(Place { root: (1, 3), ..PLACE })),
        ("downscript-place", |device, target| {
            device.downscript_place = Some(PLACE);
            target.place = None;
        }),
        ("", |device, target| {
            device.downscript = None;
            device.downscript_place = Some(PLACE);
            target.place = None;
        }),
        ("frame-in-hand", |device, _| {
            device.queue_pairs[1].frame_in_hand = Some(FrameExtent { offset: 69, length: 70 });
        }),
        ("frame-in-hand", |device, _| {
            device.queue_pairs[1].frame_in_hand = Some(FrameExtent { offset: 100, length: 10 });
        }),
        ("frame-in-hand", |device, _| {
            device.queue_pairs[1].frame_in_hand = Some(FrameExtent { offset: u64::MAX, length: 70 });
        }),
    ];
    for (name, change) in cases {
        let (mut device, mut target) = (device(), target());
        change(&mut device, &mut target);
        let refused: Vec<_> = match CheckedDevice::try_from((device, &target)) {
            Ok(_) => Vec::new(),
            Err(reasons) => reasons.0.iter().map(|reason| reason.name.clone()).collect(),
        };
        let expected: Vec<&str> = Some(name).filter(|name| !name.is_empty()).into_iter().collect();
        assert_eq!(refused, expected);
    }
}

#[test]
fn all_reasons_are_told_at_once() {
    let mut device = device();
    device.mtu = Some(1);
    device.tap.clear();
    let target = Capabilities { same_user: false, queue_pairs: Some(1), ..target() };
    let reasons = CheckedDevice::try_from((device, &target)).unwrap_err();
    let names: Vec<_> = reasons.0.iter().map(|reason| reason.name.as_str()).collect();
    assert_eq!(names, ["queue-pairs", "tap-name", "mtu", "downscript-user"]);
}
