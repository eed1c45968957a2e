//! Where packages come from: Debian's archive through apt, Python wheels through pip.
//! Called by [`crate::prepare`].

pub(crate) mod apt;
pub(crate) mod pip;
