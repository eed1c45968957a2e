//! Instructions at the end of a page whose next page is absent: #UD where the bytes at hand decide, otherwise a page
//! fault for the rest. The table is what an Intel processor did.

use crate::harness::*;
use x86_defs::Exception;
use x86_defs::paging::*;

const END: u64 = CODE + 0x1000;

/// A guest about to run `bytes`, which end where the present pages end.
fn at_the_end(bytes: &[u8]) -> Guest {
    let mut g = Guest::at_reset();
    let mut tables = Tables::long(&g.ram);
    tables.identity(RAM_BYTES, PTE_P | PTE_W);
    tables.map(END, 0, 1);
    g.long_with(&tables);
    let at = END - bytes.len() as u64;
    g.put(at, bytes);
    g.edit(|s| s.rip = at);
    g
}

#[test]
fn what_is_undefined_needs_no_next_page() {
    for bytes in [
        &[0x06][..],
        &[0x60],
        &[0xCE],
        &[0xD6],
        &[0x0F, 0x04],
        &[0x0F, 0x0A],
        &[0x0F, 0x0B],
        &[0x0F, 0x0C],
        &[0x0F, 0x0F],
        &[0x0F, 0x24],
        &[0x0F, 0x26],
        &[0x0F, 0x36],
        &[0x0F, 0x37],
        &[0x66, 0x0F, 0x04],
        &[0xF0, 0x90],
        &[0xF0, 0x01, 0xC0],
        &[0x8E, 0xC8],
        &[0x8E, 0x08],
        &[0x8D, 0xC0],
        &[0xFE, 0xD0],
        &[0xFF, 0xF8],
        &[0x8F, 0xE8],
        &[0x0F, 0xC7, 0x00],
        &[0x0F, 0x01, 0xC6],
        &[0xC4, 0xE2, 0x79, 0xFF, 0xC0],
    ] {
        let mut g = at_the_end(bytes);
        let frame = g.run_to_stub();
        let at = END - bytes.len() as u64;
        assert_eq!((frame.vector, frame.rip), (Exception::InvalidOpcode.vector(), at), "{bytes:02x?}");
        assert_eq!(g.state().cr2, 0, "{bytes:02x?}");
    }
}

#[test]
fn what_may_become_an_instruction_asks_for_the_next_page() {
    for bytes in [
        &[0xEA][..],
        &[0x82],
        &[0xD4],
        &[0x62],
        &[0xC4],
        &[0xC5],
        &[0x8F],
        &[0xFE],
        &[0xC7],
        &[0x66],
        &[0x48],
        &[0x0F],
        &[0x0F, 0x38],
        &[0x0F, 0x3A],
        &[0x0F, 0xAE],
        &[0x0F, 0xB9],
        &[0x0F, 0xFF],
        &[0xF0, 0x01],
        &[0xF0, 0x8B, 0x05],
        &[0xC4, 0xE2, 0x79],
        &[0xC5, 0xF8],
        &[0x8D, 0x05],
        &[0x48, 0x8B],
        &[0xB8, 0x00, 0x00, 0x00],
    ] {
        let mut g = at_the_end(bytes);
        let frame = g.run_to_stub();
        let at = END - bytes.len() as u64;
        assert_eq!((frame.vector, frame.rip), (Exception::PageFault.vector(), at), "{bytes:02x?}");
        assert_eq!(g.state().cr2, END, "{bytes:02x?}");
    }
}
