//! The vhost-user messages as bytes (vhost-user specification: "Message Specification").
//!
//! A [`Message`] is not checked, so that tests can send what the specification forbids.

/// Request codes (vhost-user: "Front-end message types").
pub mod request {
    /// `VHOST_USER_GET_FEATURES`
    pub const GET_FEATURES: u32 = 1;
    /// `VHOST_USER_SET_FEATURES`
    pub const SET_FEATURES: u32 = 2;
    /// `VHOST_USER_SET_OWNER`
    pub const SET_OWNER: u32 = 3;
    /// `VHOST_USER_RESET_OWNER`
    pub const RESET_OWNER: u32 = 4;
    /// `VHOST_USER_SET_MEM_TABLE`
    pub const SET_MEM_TABLE: u32 = 5;
    /// `VHOST_USER_SET_LOG_BASE`
    pub const SET_LOG_BASE: u32 = 6;
    /// `VHOST_USER_SET_LOG_FD`
    pub const SET_LOG_FD: u32 = 7;
    /// `VHOST_USER_SET_VRING_NUM`
    pub const SET_VRING_NUM: u32 = 8;
    /// `VHOST_USER_SET_VRING_ADDR`
    pub const SET_VRING_ADDR: u32 = 9;
    /// `VHOST_USER_SET_VRING_BASE`
    pub const SET_VRING_BASE: u32 = 10;
    /// `VHOST_USER_GET_VRING_BASE`
    pub const GET_VRING_BASE: u32 = 11;
    /// `VHOST_USER_SET_VRING_KICK`
    pub const SET_VRING_KICK: u32 = 12;
    /// `VHOST_USER_SET_VRING_CALL`
    pub const SET_VRING_CALL: u32 = 13;
    /// `VHOST_USER_SET_VRING_ERR`
    pub const SET_VRING_ERR: u32 = 14;
    /// `VHOST_USER_GET_PROTOCOL_FEATURES`
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    /// `VHOST_USER_SET_PROTOCOL_FEATURES`
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    /// `VHOST_USER_GET_QUEUE_NUM`
    pub const GET_QUEUE_NUM: u32 = 17;
    /// `VHOST_USER_SET_VRING_ENABLE`
    pub const SET_VRING_ENABLE: u32 = 18;
    /// `VHOST_USER_SEND_RARP`
    pub const SEND_RARP: u32 = 19;
    /// `VHOST_USER_NET_SET_MTU`
    pub const NET_SET_MTU: u32 = 20;
    /// `VHOST_USER_GET_CONFIG`
    pub const GET_CONFIG: u32 = 24;
    /// `VHOST_USER_SET_CONFIG`
    pub const SET_CONFIG: u32 = 25;
    /// `VHOST_USER_GET_INFLIGHT_FD`
    pub const GET_INFLIGHT_FD: u32 = 31;
    /// `VHOST_USER_SET_INFLIGHT_FD`
    pub const SET_INFLIGHT_FD: u32 = 32;
    /// `VHOST_USER_RESET_DEVICE`
    pub const RESET_DEVICE: u32 = 34;
    /// `VHOST_USER_GET_MAX_MEM_SLOTS`
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    /// `VHOST_USER_ADD_MEM_REG`
    pub const ADD_MEM_REG: u32 = 37;
    /// `VHOST_USER_REM_MEM_REG`
    pub const REM_MEM_REG: u32 = 38;
    /// `VHOST_USER_SET_DEVICE_STATE_FD`
    pub const SET_DEVICE_STATE_FD: u32 = 42;
    /// `VHOST_USER_CHECK_DEVICE_STATE`
    pub const CHECK_DEVICE_STATE: u32 = 43;
    /// The highest code that any known front-end sends, for tests that try all codes.
    pub const LAST: u32 = 44;
}

/// The protocol version, in the lowest two bits of a message's flags.
pub const VERSION: u32 = 0x1;
/// Message flag: this is a reply.
pub const REPLY: u32 = 0x4;
/// Message flag: the front-end wants an acknowledgement.
pub const NEED_REPLY: u32 = 0x8;
/// In the payload of `SET_VRING_KICK`, `_CALL` and `_ERR`: the message carries no file descriptor.
pub const NO_FD: u64 = 0x100;
/// The length of a message's header.
pub const HEADER_SIZE: usize = 12;

/// Protocol feature bits (vhost-user: "Protocol features").
pub mod protocol {
    /// `VHOST_USER_PROTOCOL_F_MQ`
    pub const MQ: u64 = 1 << 0;
    /// `VHOST_USER_PROTOCOL_F_LOG_SHMFD`
    pub const LOG_SHMFD: u64 = 1 << 1;
    /// `VHOST_USER_PROTOCOL_F_REPLY_ACK`
    pub const REPLY_ACK: u64 = 1 << 3;
    /// `VHOST_USER_PROTOCOL_F_CONFIG`
    pub const CONFIG: u64 = 1 << 9;
    /// `VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD`
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// `VHOST_USER_PROTOCOL_F_RESET_DEVICE`
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// `VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS`
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// `VHOST_USER_PROTOCOL_F_DEVICE_STATE`
    pub const DEVICE_STATE: u64 = 1 << 19;
}

/// One message, valid or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The request code.
    pub request: u32,
    /// Version, [`REPLY`] and [`NEED_REPLY`].
    pub flags: u32,
    /// The size that the header states.
    pub size: u32,
    /// The bytes after the header.
    pub payload: Vec<u8>,
}

impl Message {
    /// A well-formed request with this payload.
    pub fn new(request: u32, payload: Vec<u8>) -> Self {
        let size = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        Self { request, flags: VERSION, size, payload }
    }

    /// A request without a payload.
    pub fn empty(request: u32) -> Self {
        Self::new(request, Vec::new())
    }

    /// A request whose payload is one 64-bit number.
    pub fn u64(request: u32, value: u64) -> Self {
        Self::new(request, value.to_le_bytes().to_vec())
    }

    /// A request whose payload is a vring state: an index and a number.
    pub fn vring_state(request: u32, index: u32, number: u32) -> Self {
        Self::new(request, [index.to_le_bytes(), number.to_le_bytes()].concat())
    }

    /// `SET_VRING_ADDR`, with addresses in the front-end's address space.
    pub fn vring_addresses(index: u32, descriptors: u64, used: u64, available: u64) -> Self {
        Self::logged_vring_addresses(index, [descriptors, used, available], None)
    }

    /// As [`Self::vring_addresses`], for the descriptor table, the used ring and the available ring. With a `log`
    /// address, sets `VRING_F_LOG`: the back-end logs its writes to the used ring at that guest address.
    pub fn logged_vring_addresses(index: u32, rings: [u64; 3], log: Option<u64>) -> Self {
        let flags = u32::from(log.is_some());
        let mut payload = [index, flags].map(u32::to_le_bytes).concat();
        for address in rings.into_iter().chain([log.unwrap_or(0)]) {
            payload.extend_from_slice(&address.to_le_bytes());
        }
        Self::new(request::SET_VRING_ADDR, payload)
    }

    /// `SET_MEM_TABLE`.
    pub fn memory_table(regions: &[MemoryRegion]) -> Self {
        let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
        let mut payload = [count.to_le_bytes(), 0u32.to_le_bytes()].concat();
        payload.extend(regions.iter().flat_map(MemoryRegion::encode));
        Self::new(request::SET_MEM_TABLE, payload)
    }

    /// `SET_LOG_BASE`, with a log of `size` bytes at `offset` of the file that comes with it.
    pub fn log_base(size: u64, offset: u64) -> Self {
        Self::new(request::SET_LOG_BASE, [size, offset].map(u64::to_le_bytes).concat())
    }

    /// `GET_INFLIGHT_FD` or `SET_INFLIGHT_FD`, with a region of `size` bytes at `offset` of its file, for `queues`
    /// vrings of `entries` descriptors.
    pub fn inflight(request: u32, size: u64, offset: u64, queues: u16, entries: u16) -> Self {
        let mut payload = [size, offset].map(u64::to_le_bytes).concat();
        payload.extend([queues, entries].map(u16::to_le_bytes).concat());
        // All implementations send the padding of the C structure, too.
        payload.extend([0; 4]);
        Self::new(request, payload)
    }

    /// `ADD_MEM_REG` or `REM_MEM_REG`.
    pub fn single_region(request: u32, region: &MemoryRegion) -> Self {
        let mut payload = 0u64.to_le_bytes().to_vec();
        payload.extend(region.encode());
        Self::new(request, payload)
    }

    /// `SET_DEVICE_STATE_FD` in the stopped phase: the back-end saves its state to the descriptor, or loads it from
    /// there.
    pub fn device_state(save: bool) -> Self {
        Self::new(request::SET_DEVICE_STATE_FD, [u32::from(!save), 0].map(u32::to_le_bytes).concat())
    }

    /// `GET_CONFIG`, with room for `length` bytes from `offset`.
    pub fn get_config(offset: u32, length: u32) -> Self {
        let mut payload = [offset, length, 0].map(u32::to_le_bytes).concat();
        payload.resize(payload.len() + usize::try_from(length).unwrap_or(0), 0);
        Self::new(request::GET_CONFIG, payload)
    }

    /// The same message with these flags.
    pub fn with_flags(self, flags: u32) -> Self {
        Self { flags, ..self }
    }

    /// The same message, requesting an acknowledgement.
    pub fn with_need_reply(self) -> Self {
        Self { flags: self.flags | NEED_REPLY, ..self }
    }

    /// The same message, with this size in its header, whatever its payload is.
    pub fn with_size(self, size: u32) -> Self {
        Self { size, ..self }
    }

    /// The bytes to send.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = [self.request, self.flags, self.size].map(u32::to_le_bytes).concat();
        bytes.extend_from_slice(&self.payload);
        bytes
    }
}

/// A memory region as a message describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// The first guest physical address.
    pub guest_address: u64,
    /// The size in bytes.
    pub size: u64,
    /// The first address in the front-end's address space, to which ring addresses refer.
    pub user_address: u64,
    /// The offset of the region in its file.
    pub file_offset: u64,
}

impl MemoryRegion {
    fn encode(&self) -> Vec<u8> {
        [self.guest_address, self.size, self.user_address, self.file_offset].map(u64::to_le_bytes).concat()
    }
}

/// Reads the little-endian 16-bit number at `offset`. Returns `None` if `bytes` is too short.
pub fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(offset..)?.first_chunk().copied()?))
}

/// Reads the little-endian 32-bit number at `offset`. Returns `None` if `bytes` is too short.
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(offset..)?.first_chunk().copied()?))
}

/// Reads the little-endian 64-bit number at `offset`. Returns `None` if `bytes` is too short.
pub fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(offset..)?.first_chunk().copied()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_encoded_as_header_and_payload() {
        let message = Message::vring_state(request::SET_VRING_NUM, 2, 0x1234).with_need_reply();
        let expected = [8, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0, 0, 2, 0, 0, 0, 0x34, 0x12, 0, 0];
        assert_eq!(message.encode(), expected);
    }

    #[test]
    fn messages_have_the_sizes_of_the_specification() {
        let region = MemoryRegion { guest_address: 1, size: 2, user_address: 3, file_offset: 4 };
        assert_eq!(Message::memory_table(&[region, region]).size, 8 + 2 * 32);
        assert_eq!(Message::single_region(request::ADD_MEM_REG, &region).size, 40);
        assert_eq!(Message::vring_addresses(0, 1, 2, 3).size, 40);
        assert_eq!(Message::get_config(0, 12).size, 24);
        assert_eq!(Message::empty(request::GET_FEATURES).encode().len(), HEADER_SIZE);
    }

    #[test]
    fn a_header_can_state_a_wrong_size() {
        assert_eq!(Message::empty(1).with_size(0xffff_ffff).encode()[8..], [0xff; 4]);
    }

    #[test]
    fn numbers_are_read_at_their_offset() {
        let bytes = [1, 0, 0, 0, 2, 0, 0, 0, 3];
        assert_eq!(u32_at(&bytes, 4), Some(2));
        assert_eq!(u64_at(&bytes, 0), Some(0x2_0000_0001));
        assert_eq!(u32_at(&bytes, 6), None);
    }
}
