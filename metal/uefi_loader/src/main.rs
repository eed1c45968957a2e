//! `bedplate-metal.efi`.
#![cfg_attr(target_os = "uefi", no_std, no_main)]

#[cfg(target_os = "uefi")]
mod firmware;

#[cfg(target_os = "uefi")]
#[uefi::entry]
fn main() -> uefi::Status {
    firmware::run()
}

#[cfg(not(target_os = "uefi"))]
fn main() {
    eprintln!("bedplate-metal.efi runs on UEFI firmware: `cargo xtask metal build` makes it");
    std::process::exit(2);
}
