//! A vhost-user network back-end that owns its TAP.
