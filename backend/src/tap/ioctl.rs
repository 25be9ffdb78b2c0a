//! The TUN/TAP ioctls of `linux/if_tun.h`, with the argument types that the kernel actually uses.

const T: u8 = b'T';
nix::ioctl_write_ptr_bad!(set_iff, nix::request_code_write!(T, 202, 4), libc::ifreq);
nix::ioctl_write_int_bad!(set_persist, nix::request_code_write!(T, 203, 4));
nix::ioctl_read_bad!(get_features, nix::request_code_read!(T, 207, 4), libc::c_uint);
nix::ioctl_write_int_bad!(set_offload, nix::request_code_write!(T, 208, 4));
nix::ioctl_write_ptr_bad!(set_tx_filter, nix::request_code_write!(T, 209, 4), [u16; 2]);
nix::ioctl_read_bad!(get_iff, nix::request_code_read!(T, 210, 4), libc::ifreq);
nix::ioctl_read_bad!(get_sndbuf, nix::request_code_read!(T, 211, 4), libc::c_int);
nix::ioctl_write_ptr_bad!(set_sndbuf, nix::request_code_write!(T, 212, 4), libc::c_int);
nix::ioctl_none_bad!(detach_filter, nix::request_code_write!(T, 214, size_of::<libc::sock_fprog>()));
nix::ioctl_read_bad!(get_vnet_hdr_size, nix::request_code_read!(T, 215, 4), libc::c_int);
nix::ioctl_write_ptr_bad!(set_vnet_hdr_size, nix::request_code_write!(T, 216, 4), libc::c_int);
nix::ioctl_write_ptr_bad!(set_queue, nix::request_code_write!(T, 217, 4), libc::ifreq);
nix::ioctl_write_ptr_bad!(set_steering, nix::request_code_read!(T, 224, 4), libc::c_int);
nix::ioctl_write_ptr_bad!(set_filter_program, nix::request_code_read!(T, 225, 4), libc::c_int);
nix::ioctl_write_ptr_bad!(set_carrier, nix::request_code_write!(T, 226, 4), libc::c_int);
