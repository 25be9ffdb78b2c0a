//! The device's configuration space, `struct virtio_net_config` (virtio 1.2 §5.1.4), for `GET_CONFIG`.

use crate::device::DeviceConfig;

/// The largest configuration space (vhost-user: "Virtio device config space"), in bytes.
const SIZE: usize = 256;
/// `VIRTIO_NET_S_LINK_UP`.
const LINK_UP: u16 = 1;
/// Unknown link speed.
const SPEED_UNKNOWN: u32 = u32::MAX;
/// Unknown duplex mode.
const DUPLEX_UNKNOWN: u8 = 0xff;

/// Returns `size` bytes of the configuration space from `offset` on, or `None` if they go beyond its end. Fields that
/// the device does not have read as 0.
pub fn read(config: &DeviceConfig, pairs: u16, offset: u32, size: u32) -> Option<Vec<u8>> {
    let mut space = Vec::with_capacity(SIZE);
    space.extend(config.mac.unwrap_or_default());
    space.extend(LINK_UP.to_le_bytes());
    space.extend(pairs.to_le_bytes());
    space.extend(config.mtu.unwrap_or_default().to_le_bytes());
    space.extend(SPEED_UNKNOWN.to_le_bytes());
    space.push(DUPLEX_UNKNOWN);
    space.resize(SIZE, 0);
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(usize::try_from(size).ok()?)?;
    space.get(start..end).map(<[u8]>::to_vec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_at_the_offsets_of_the_specification() {
        let config =
            DeviceConfig { mac: Some([2, 0, 0, 0, 0, 1]), mtu: Some(9000), ..DeviceConfig::default() };
        let space = read(&config, 4, 0, 12).unwrap();
        assert_eq!(space, [2, 0, 0, 0, 0, 1, 1, 0, 4, 0, 0x28, 0x23]);
        assert_eq!(read(&config, 4, 8, 2).unwrap(), [4, 0]);
    }

    #[test]
    fn reading_beyond_the_end_is_refused() {
        let config = DeviceConfig::default();
        assert!(read(&config, 1, 0, 256).is_some());
        assert!(read(&config, 1, 1, 256).is_none());
        assert!(read(&config, 1, u32::MAX, u32::MAX).is_none());
    }
}
