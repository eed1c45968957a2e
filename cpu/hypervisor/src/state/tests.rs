//! Tests of the vCPU state's saved form.

use super::*;
use alloc::format;
use alloc::string::String;
use proptest::prelude::*;
use saved_state::{CRITICAL, FieldWriter, RestoreError, from_blob, to_blob};
use x86_defs::msr;

/// Every field away from its default, in 64-bit mode.
fn busy() -> VcpuState {
    let mut state = VcpuState {
        gpr: core::array::from_fn(|i| 0x1111_1111_1111_1111 * i as u64),
        rip: 0xFFFF_FFFF_8100_0000,
        rflags: 0x246,
        cr0: 0x8005_0033,
        cr2: 0x7FFF_1234_5000,
        cr3: 0x1000_0001,
        cr4: 0x3706F0,
        efer: 0xD01,
        xcr0: 7,
        dr: [1, 2, 3, 4, 0xFFFF_4FF1, 0x401],
        pdpte: [0x1001, 0, 0, 0x4001],
        msrs: [(0x10, 5), (0xC000_0081, 0x0023_0010_0000_0000)].into(),
        apic: Some(StateBlob { kind: "apic".into(), version: 2, data: [9, 8, 7].into() }),
        run_state: RunState::Halted,
        shadow: InterruptShadow::MovSs,
        nmi_pending: true,
        nmi_blocked: true,
        exception: Some(PendingEvent {
            exception: Exception::PageFault,
            error_code: Some(6),
            address: 0xDEAD_B000,
            is_trap: false,
        }),
        tsc_offset: 0xFFFF_FFFF_FFFF_0000,
        tsc_adjust: 77,
        tsc_deadline: 0x1_0000_0000,
        ..VcpuState::default()
    };
    state.segments[1].attributes = SegmentAttributes(0xA9B);
    state.segments[4].base = 0x7FFF_F7D8_0740;
    state.ldtr.unusable = true;
    state.x87.registers[3] = Float80 { mantissa: 1 << 63, sign_exponent: 0xBFFF };
    state.x87.in_use = 8;
    state.sse.xmm[15] = [3, 4];
    state.avx[0] = [5, 6];
    state
}

fn hex(data: &[u8]) -> String {
    data.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn states_round_trip() {
    let interrupted = |vector| VcpuState { interrupt: Some(vector), ..VcpuState::default() };
    for state in [VcpuState::default(), busy(), interrupted(0), interrupted(255)] {
        assert_eq!(from_blob::<VcpuState>(&to_blob(&state)), Ok(state));
    }
}

/// Version 1 as released: readable for ever, never changed.
#[test]
fn golden_bytes_of_version_1() {
    let text: String = include_str!("golden_v1.hex").split_whitespace().collect();
    assert_eq!(hex(&to_blob(&busy()).data), text);
    let byte = |i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap();
    let data = (0..text.len() / 2).map(byte).collect();
    let blob = StateBlob { kind: "vcpu".into(), version: 1, data };
    assert_eq!(from_blob::<VcpuState>(&blob), Ok(busy()));
}

#[test]
fn impossible_states_are_refused() {
    type Spoil = fn(&mut VcpuState);
    let cases: [(&str, Spoil); 27] = [
        ("RFLAGS", |s| s.rflags = 0),
        ("RFLAGS", |s| s.rflags |= 1 << 30),
        ("CR0", |s| s.cr0 &= !control::CR0_PE),
        ("CR0", |s| s.cr0 = s.cr0 & !control::CR0_CD | control::CR0_NW),
        ("CR4 has", |s| s.cr4 |= 1 << 13),
        ("CR3", |s| s.cr3 = 1 << 46),
        ("EFER", |s| s.efer &= !control::EFER_LMA),
        ("EFER", |s| s.efer |= 1 << 12),
        ("CR4 does not fit", |s| s.cr4 &= !control::CR4_PAE),
        ("CR4 does not fit", |s| s.rflags |= flags::VM),
        ("XCR0", |s| s.xcr0 = 5),
        ("XCR0", |s| s.xcr0 = 0x10),
        ("DR6 or DR7", |s| s.dr[5] = 1 << 32),
        ("segment's base", |s| s.segments[5].base = 1 << 63),
        ("table's base", |s| s.idtr.base = 1 << 47),
        ("RIP", |s| s.segments[1].attributes.0 &= !0x200),
        ("MXCSR", |s| s.sse.mxcsr = 0x10000),
        ("opcode", |s| s.x87.opcode = 0x800),
        ("MSR", |s| s.msrs = [(msr::LSTAR, 1 << 47)].into()),
        ("MSR", |s| s.msrs = [(msr::CSTAR, 1 << 63)].into()),
        ("MSR", |s| s.msrs = [(msr::KERNEL_GS_BASE, 0x8000_0000_0000)].into()),
        ("MSR", |s| s.msrs = [(msr::SYSENTER_ESP, 1 << 48)].into()),
        ("MSR", |s| s.msrs = [(msr::SYSENTER_EIP, 1 << 48)].into()),
        ("MSR", |s| s.msrs = [(msr::SYSENTER_CS, 1 << 32)].into()),
        ("MSR", |s| s.msrs = [(msr::SFMASK, 1 << 32)].into()),
        ("MSR", |s| s.msrs = [(msr::TSC_AUX, 1 << 32)].into()),
        ("MSR", |s| s.msrs = [(msr::PAT, 0x0007_0406_0007_0402)].into()),
    ];
    for (text, spoil) in cases {
        let mut state = busy();
        spoil(&mut state);
        let error = from_blob::<VcpuState>(&to_blob(&state)).unwrap_err();
        assert!(format!("{error}").contains(text), "{text}: {error}");
    }
}

#[test]
fn missing_and_unknown_fields_are_refused() {
    let empty = StateBlob { kind: "vcpu".into(), version: 1, data: Vec::new() };
    assert_eq!(from_blob::<VcpuState>(&empty), Err(RestoreError::Missing("general registers")));
    // SMBASE, from a version that knows it.
    let mut blob = to_blob(&busy());
    let mut w = FieldWriter::default();
    w.uint(CRITICAL | 96, 0x30000u32);
    blob.data.extend_from_slice(&w.finish());
    assert_eq!(from_blob::<VcpuState>(&blob), Err(RestoreError::UnknownCritical { tag: CRITICAL | 96 }));
}

#[test]
fn msrs_must_ascend() {
    for msrs in [[(2, 0), (1, 0)], [(1, 0), (1, 0)]] {
        let state = VcpuState { msrs: msrs.into(), ..busy() };
        assert!(matches!(from_blob::<VcpuState>(&to_blob(&state)), Err(RestoreError::Value { .. })));
    }
}

proptest! {
    #[test]
    fn flipped_and_cut_blobs_are_refused_or_valid(at in 0usize..1400, bit in 0u8..8, cut in 0usize..1500) {
        let mut blob = to_blob(&busy());
        if let Some(b) = blob.data.get_mut(at) {
            *b ^= 1 << bit;
        }
        blob.data.truncate(cut);
        if let Ok(state) = from_blob::<VcpuState>(&blob) {
            // What is taken can be saved again and means the same.
            prop_assert_eq!(from_blob::<VcpuState>(&to_blob(&state)), Ok(state));
        }
    }

    #[test]
    fn hostile_bytes_never_panic(data in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = from_blob::<VcpuState>(&StateBlob { kind: "vcpu".into(), version: 1, data });
    }

    #[test]
    fn registers_round_trip(gpr in any::<[u64; 16]>(), mantissas in any::<[u64; 8]>(), avx in any::<[[u64; 2]; 16]>()) {
        let mut state = VcpuState { gpr, avx, ..busy() };
        for (r, m) in state.x87.registers.iter_mut().zip(mantissas) {
            r.mantissa = m;
        }
        prop_assert_eq!(from_blob::<VcpuState>(&to_blob(&state)), Ok(state));
    }
}
