//! The image for bare metal is linked at a fixed address (`link.ld`); on a host there is nothing to do.

fn main() {
    println!("cargo:rerun-if-changed=link.ld");
    let bare = std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "none");
    if let Some(folder) = std::env::var_os("CARGO_MANIFEST_DIR").filter(|_| bare) {
        println!("cargo:rustc-link-arg-bins=-T{}/link.ld", folder.display());
        println!("cargo:rustc-link-arg-bins=-zmax-page-size=4096");
        println!("cargo:rustc-link-arg-bins=-no-pie");
    }
}
