//! Kernels of a few bytes: ELF files with a PVH entry, entered in flat 32-bit protected mode.

use alloc::vec::Vec;

/// Where the code stands, and is entered.
pub const ENTRY: u32 = 0x10_0000;

const HEADER_BYTES: u32 = 52;
const PROGRAM_HEADER_BYTES: u32 = 32;
const NOTE_OFFSET: u32 = HEADER_BYTES + 2 * PROGRAM_HEADER_BYTES;
const NOTE_BYTES: u32 = 20;
const CODE_OFFSET: u32 = NOTE_OFFSET + NOTE_BYTES;

/// An ELF file that runs `code` (position-independent, or for [`ENTRY`]).
pub fn pvh(code: &[u8]) -> Vec<u8> {
    let mut file = Vec::new();
    file.extend_from_slice(b"\x7FELF\x01\x01\x01\0\0\0\0\0\0\0\0\0");
    let words = |file: &mut Vec<u8>, words: &[u32]| {
        words.iter().for_each(|w| file.extend_from_slice(&w.to_le_bytes()))
    };
    file.extend_from_slice(&[2, 0, 3, 0]); // executable, for the 80386
    words(&mut file, &[1, ENTRY, HEADER_BYTES, 0, 0]);
    for half in [HEADER_BYTES, PROGRAM_HEADER_BYTES, 2, 40, 0, 0] {
        file.extend_from_slice(&(half as u16).to_le_bytes());
    }
    let bytes = code.len() as u32;
    words(&mut file, &[1, CODE_OFFSET, ENTRY, ENTRY, bytes, bytes, 7, 1]);
    words(&mut file, &[4, NOTE_OFFSET, 0, 0, NOTE_BYTES, NOTE_BYTES, 4, 4]);
    words(&mut file, &[4, 4, 18]); // XEN_ELFNOTE_PHYS32_ENTRY
    file.extend_from_slice(b"Xen\0");
    words(&mut file, &[ENTRY]);
    file.extend_from_slice(code);
    file
}

/// Code that does nothing for ever: CLI, HLT and back.
pub const IDLE: [u8; 4] = [0xFA, 0xF4, 0xEB, 0xFD];

/// Code that writes `text` to COM1 and goes on behind it.
pub fn print(text: &str) -> Vec<u8> {
    let mut code = alloc::vec![0x66, 0xBA, 0xF8, 0x03]; // mov dx, 3F8h
    for byte in text.bytes() {
        code.extend_from_slice(&[0xB0, byte, 0xEE]); // mov al, byte; out dx, al
    }
    code
}

/// Code that turns the machine off.
pub fn power_off() -> Vec<u8> {
    use machine_spec::layout::{port, power};
    let [low, high] = port::PM1A_CONTROL.to_le_bytes();
    let value = u16::from(power::SLEEP_TYPE_S5) << 10 | 1 << 13;
    let [v0, v1] = value.to_le_bytes();
    // mov dx, port; mov ax, value; out dx, ax; and then nothing.
    let mut code = alloc::vec![0x66, 0xBA, low, high, 0x66, 0xB8, v0, v1, 0x66, 0xEF];
    code.extend_from_slice(&IDLE);
    code
}

/// Code that reads the HPET's counter `times` times with the x87 unit and counts that there; prints `done`, or `lost` where the
/// count came out wrong. No KVM can emulate such a read, and no processor executes it.
pub fn read_devices_with_x87(times: u32) -> Vec<u8> {
    let [a, b, c, d] = times.to_le_bytes();
    let lost = print("lost");
    let mut code = alloc::vec![
        0xBE,
        0xF0,
        0x00,
        0xD0,
        0xFE, // mov esi, HPET's counter
        0xDB,
        0xE3,
        0xD9,
        0xEE, // fninit; fldz
        0xB9,
        a,
        b,
        c,
        d, // mov ecx, times
        0xDF,
        0x2E,
        0xDD,
        0xD8, // fild qword [esi]; fstp st0
        0xD9,
        0xE8,
        0xDE,
        0xC1, // fld1; faddp
        0x49,
        0x75,
        0xF5, // dec ecx; jnz fild
        0xBB,
        0x00,
        0x00,
        0x20,
        0x00,
        0xDB,
        0x1B, // mov ebx, 200000h; fistp dword [ebx]
        0x81,
        0x3B,
        a,
        b,
        c,
        d, // cmp dword [ebx], times
        0x74,
        lost.len() as u8, // je behind
    ];
    code.extend(lost);
    code.extend(print("done"));
    code
}
