//! The layout of packets, and the errors for invalid ones.

use baton_protocol::codec::{CodecError, HEADER, Header, Message, Protocol};
use baton_protocol::version::Versions;
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

const PROTOCOL: Protocol =
    Protocol { magic: *b"TEST", versions: Versions { oldest: 2, newest: 3 }, max_body: 256 };

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Point {
    x: u64,
    #[serde(default)]
    names: Vec<String>,
}

/// A later version's point, with an added and a removed field.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct LaterPoint {
    later: Vec<Option<Point>>,
    x: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Empty {}

baton_protocol::messages! {
    #[derive(Clone, Debug, PartialEq)]
    enum Said: PROTOCOL {
        Point(Point) = 1 "POINT",
        Empty(Empty) = 7 "EMPTY",
    }
}

baton_protocol::messages! {
    #[derive(Clone, Debug, PartialEq)]
    enum LaterSaid: PROTOCOL {
        Point(LaterPoint) = 1 "POINT",
    }
}

fn packet() -> Vec<u8> {
    Said::Point(Point { x: 300, names: vec!["a".to_owned()] }).encode().expect("the message is short")
}

#[test]
fn packet_has_the_documented_layout() {
    let packet = packet();
    assert_eq!(&packet[..HEADER], b"TEST\x03\0\x02\0\x01\0\0\0\x0f\0\0\0");
    assert_eq!(&packet[HEADER..], b"\x82\xa1x\xcd\x01\x2c\xa5names\x91\xa1a");
    assert_eq!(Said::decode(&packet).unwrap(), Said::Point(Point { x: 300, names: vec!["a".to_owned()] }));
}

#[test]
fn header_is_read_without_the_body() {
    let header = Header::parse(PROTOCOL, &packet()[..HEADER]).unwrap();
    assert_eq!(header, Header { versions: PROTOCOL.versions, kind: 1, length: 15 });
}

#[test]
fn unknown_fields_are_skipped_and_absent_ones_get_defaults() {
    let nested = Some(Point { x: 1, names: vec!["deep".to_owned()] });
    let later = LaterSaid::Point(LaterPoint { later: vec![nested, None], x: 5 }).encode().unwrap();
    assert_eq!(Said::decode(&later).unwrap(), Said::Point(Point { x: 5, names: vec![] }));
}

#[test]
fn invalid_packet_is_refused_with_the_matching_error() {
    fn refusal(change: impl FnOnce(&mut Vec<u8>)) -> CodecError {
        let mut packet = packet();
        change(&mut packet);
        Said::decode(&packet).unwrap_err()
    }
    assert!(matches!(refusal(|packet| packet[0] = b'B'), CodecError::Magic(_)));
    assert!(matches!(refusal(|packet| packet[4] = 1), CodecError::Version(_)));
    assert!(matches!(refusal(|packet| packet[6] = 4), CodecError::Version(_)));
    assert!(matches!(refusal(|packet| packet[8] = 2), CodecError::Kind(2)));
    assert!(matches!(refusal(|packet| packet[10] = 1), CodecError::Flags(1)));
    assert!(matches!(refusal(|packet| packet[12] = 16), CodecError::Truncated { .. }));
    assert!(matches!(refusal(|packet| packet[13] = 2), CodecError::TooLong { .. }));
    assert!(matches!(refusal(|packet| packet.push(0)), CodecError::Surplus(1)));
    assert!(matches!(refusal(|packet| packet.truncate(HEADER - 1)), CodecError::Truncated { .. }));
    assert!(matches!(refusal(|packet| packet[HEADER] = 0xc0), CodecError::Body { .. }));
    // The map announces one entry fewer, so bytes are left over.
    assert!(matches!(refusal(|packet| packet[HEADER] = 0x81), CodecError::Surplus(_)));
}

#[test]
fn message_over_the_protocol_limit_is_not_encoded() {
    let error = Said::Point(Point { x: 0, names: vec!["x".repeat(256)] }).encode().unwrap_err();
    assert!(matches!(error, CodecError::TooLong { .. }), "{error}");
}

#[test]
fn nesting_depth_is_limited() {
    // The unknown field `d` is nested as deep as the body is long.
    let mut body = b"\x82\xa1x\0\xa1d".to_vec();
    body.extend(std::iter::repeat_n(0x91, 200));
    body.push(0xc0);
    let error = Said::from_body(1, &body).unwrap_err();
    assert!(matches!(error, CodecError::Body { .. }), "{error}");
}

proptest! {
    #[test]
    fn arbitrary_bytes_do_not_panic_the_decoder(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Said::decode(&bytes);
        let _ = Said::from_body(1, &bytes);
    }

    #[test]
    fn damaged_packets_do_not_panic_the_decoder(
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        length in 0usize..40,
    ) {
        let mut packet = packet();
        for (at, value) in damage {
            let at = at.index(packet.len());
            packet[at] = value;
        }
        packet.truncate(length);
        let _ = Said::decode(&packet);
    }

    #[test]
    fn message_round_trips(x: u64, names in proptest::collection::vec("[a-z]{0,8}", 0..8)) {
        let said = Said::Point(Point { x, names });
        prop_assert_eq!(Said::decode(&said.encode().unwrap()).unwrap(), said);
    }
}
