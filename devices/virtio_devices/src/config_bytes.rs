//! Device configuration structures, little-endian and packed as the specification draws them.

/// Copies what of `config` lies at `offset` into `data`; behind its end `data` stays as it is.
pub(crate) fn read(config: &[u8], offset: usize, data: &mut [u8]) {
    let Some(from) = config.get(offset..) else { return };
    let n = from.len().min(data.len());
    data[..n].copy_from_slice(&from[..n]);
}

/// Puts `value` at `at`; a structure that is too short is a bug of its device.
pub(crate) fn put<const N: usize>(config: &mut [u8], at: usize, value: [u8; N]) {
    config[at..at + N].copy_from_slice(&value);
}
