//! Settings of the TAP as a whole that every holder of a queue can change without privileges (Linux:
//! `__tun_chr_ioctl`). They are recorded before another process gets the descriptors, and restored when the TAP comes
//! back.
#![expect(unsafe_code, reason = "TAP ioctls")]

use std::os::fd::AsRawFd;

use nix::errno::Errno;

use super::{Tap, TapError, empty_request, interface, ioctl};

/// `IFF_PERSIST` of `linux/if_tun.h`.
const PERSIST: libc::c_int = 0x0800;

/// The settings of a TAP before another process got its descriptors. `None` is unknown and is not restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Shared {
    persistent: Option<bool>,
    carrier: Option<bool>,
    address: Option<[u8; 6]>,
}

impl Shared {
    fn of(tap: &Tap) -> Self {
        let file = &tap.queues[0].file;
        let name = tap.name();
        // A macvtap has neither persistence nor a settable carrier.
        let is_tap = !tap.queues[0].macvtap;
        Self {
            persistent: is_tap.then(|| is_persistent(file).ok()).flatten(),
            carrier: is_tap.then(|| interface::carrier(file, &name)).flatten(),
            address: interface::address(file, &name).ok(),
        }
    }
}

impl Tap {
    /// Records the settings before another process gets the descriptors.
    pub fn remember(&mut self) {
        self.shared = Some(Shared::of(self));
    }

    /// Restores the settings that differ from those that [`Self::remember`] recorded. Tries every setting, even after
    /// an error.
    pub(super) fn restore_shared(&self) -> Result<(), TapError> {
        let Some(before) = self.shared else { return Ok(()) };
        let now = Shared::of(self);
        let file = &self.queues[0].file;
        let fd = file.as_raw_fd();
        let mut result = Ok(());
        let mut note = |what, done: Result<libc::c_int, Errno>| {
            baton_control::limited!(warn, what, "restoring a TAP setting that another process changed");
            if let Err(errno) = done
                && result.is_ok()
            {
                result = Err(self.failed(what, errno));
            }
        };
        if let Some(persistent) = before.persistent.filter(|_| now.persistent != before.persistent) {
            // SAFETY: TUNSETPERSIST takes its argument by value.
            note("TUNSETPERSIST", unsafe { ioctl::set_persist(fd, persistent.into()) });
        }
        if let Some(address) = before.address.filter(|_| now.address != before.address) {
            note("SIOCSIFHWADDR", interface::set_address(file, address));
        }
        if let Some(carrier) = before.carrier.filter(|_| now.carrier != before.carrier) {
            let carrier = libc::c_int::from(carrier);
            // SAFETY: TUNSETCARRIER reads an int.
            note("TUNSETCARRIER", unsafe { ioctl::set_carrier(fd, &raw const carrier) });
        }
        result
    }
}

fn is_persistent(file: &impl AsRawFd) -> nix::Result<bool> {
    let mut request = empty_request();
    // SAFETY: TUNGETIFF fills an ifreq.
    unsafe { ioctl::get_iff(file.as_raw_fd(), &raw mut request) }?;
    // SAFETY: TUNGETIFF sets the flags.
    Ok(libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags }) & PERSIST != 0)
}
