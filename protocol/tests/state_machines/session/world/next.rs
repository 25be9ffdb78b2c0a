//! A simulated next version, which adds fields to every structure and reads the packets of this version.

use baton_protocol::codec::{self, HEADER, Message as _, Protocol};
use baton_protocol::handover::wire::message::{
    Active, Commit, Descriptors, Hello, Message, PROTOCOL, Prepare, ReadyToTake, Refuse, Stage, StagedAll,
};
use baton_protocol::version::Versions;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

const NEXT: Protocol = Protocol {
    versions: Versions { oldest: PROTOCOL.versions.oldest, newest: PROTOCOL.versions.newest + 1 },
    ..PROTOCOL
};

/// A body with an additional field that this version does not know.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Later<T> {
    #[serde(flatten)]
    known: T,
    #[serde(default)]
    later: Option<u32>,
}

baton_protocol::messages! {
    #[derive(Clone, Debug)]
    enum Next: NEXT {
        Hello(Later<Hello>) = 1 "HELLO",
        Refuse(Later<Refuse>) = 2 "REFUSE",
        Prepare(Later<Prepare>) = 3 "PREPARE",
        Ready(Later<ReadyToTake>) = 4 "READY",
        Stage(Later<Stage>) = 10 "STAGE",
        Descriptors(Later<Descriptors>) = 11 "DESCRIPTORS",
        Staged(Later<StagedAll>) = 12 "STAGED",
        Commit(Later<Commit>) = 13 "COMMIT",
        Active(Later<Active>) = 14 "ACTIVE",
    }
}

/// Encodes a message as the next version does.
pub fn write(message: &Message) -> Vec<u8> {
    fn later<T: Clone>(known: &T) -> Later<T> {
        Later { known: known.clone(), later: Some(7) }
    }
    let next = match message {
        Message::Hello(body) => Next::Hello(later(body)),
        Message::Refuse(body) => Next::Refuse(later(body)),
        Message::Prepare(body) => Next::Prepare(later(body)),
        Message::Ready(body) => Next::Ready(later(body)),
        Message::Stage(body) => Next::Stage(later(body)),
        Message::Descriptors(body) => Next::Descriptors(later(body)),
        Message::Staged(body) => Next::Staged(later(body)),
        Message::Commit(body) => Next::Commit(later(body)),
        Message::Active(body) => Next::Active(later(body)),
        other => panic!("{} does not belong to a session's hand-over", other.name()),
    };
    let packet = next.encode().unwrap();
    let mut body: Value = rmp_serde::from_slice(&packet[HEADER..]).unwrap();
    add_fields(&mut body);
    codec::encode(NEXT, next.kind(), &body).unwrap()
}

/// Adds a field to every structure, at any depth.
fn add_fields(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.values_mut().for_each(add_fields);
            fields.insert("a_new_thing".to_owned(), json!({ "of": [1, "kind"] }));
        }
        Value::Array(list) => list.iter_mut().for_each(add_fields),
        _ => {}
    }
}

/// Decodes a packet of this version as the next version does.
pub fn read(packet: &[u8]) -> Option<Message> {
    fn known<T>(body: Later<T>) -> T {
        assert_eq!(body.later, None, "this version does not know the field");
        body.known
    }
    Some(match Next::decode(packet).ok()? {
        Next::Hello(body) => Message::Hello(known(body)),
        Next::Refuse(body) => Message::Refuse(known(body)),
        Next::Prepare(body) => Message::Prepare(known(body)),
        Next::Ready(body) => Message::Ready(known(body)),
        Next::Stage(body) => Message::Stage(Box::new(known(body))),
        Next::Descriptors(body) => Message::Descriptors(known(body)),
        Next::Staged(body) => Message::Staged(known(body)),
        Next::Commit(body) => Message::Commit(known(body)),
        Next::Active(body) => Message::Active(known(body)),
    })
}
