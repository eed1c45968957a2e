//! Random states, into KVM and back.

use super::extended;
use crate::engine::KvmHypervisor;
use apic::ApicState;
use guest_memory::GuestRam;
use guest_time::GuestClock;
use hypervisor::state::{Float80, InterruptShadow, PendingEvent, RunState};
use hypervisor::{CpuModel, Hypervisor, Partition, PartitionLayout, Vcpu, VcpuState, Wake};
use kvm_bindings::kvm_xsave;
use proptest::prelude::*;
use saved_state::{from_blob, to_blob};
use std::sync::Arc;
use x86_defs::control::*;
use x86_defs::cpuid::Feature;
use x86_defs::{DescriptorTable, Exception, Segment, SegmentAttributes, msr};

struct Still;
impl guest_time::HostTime for Still {
    fn now_ns(&self) -> u64 {
        0
    }
    fn wall_ns(&self) -> u64 {
        0
    }
}
struct NoWake;
impl Wake for NoWake {
    fn wake(&self) {}
}

type One = (Box<dyn Partition>, Box<dyn Vcpu>, bool);

/// A vCPU (number 1: it can wait for SIPI) with the model's AVX or without; `None` without KVM.
fn vcpu() -> Option<One> {
    let kvm = match KvmHypervisor::open() {
        Ok(kvm) => kvm,
        Err(error) => {
            eprintln!("not run: {error}");
            return None;
        }
    };
    let mut cpu_model = CpuModel::max();
    for feature in kvm.capabilities().features.missing_from(cpu_model.features).iter() {
        cpu_model.features.remove(feature);
    }
    let avx = cpu_model.features.has(Feature::Avx);
    let layout = PartitionLayout {
        ram: GuestRam::for_test(1 << 20),
        vcpus: 2,
        cpu_model,
        tsc_khz: kvm.capabilities().tsc_khz.unwrap(),
        clock: GuestClock::new(Box::new(Still)),
    };
    let partition = kvm.create_partition(&layout).unwrap();
    partition.create_vcpu(0, Arc::new(NoWake)).unwrap();
    let vcpu = partition.create_vcpu(1, Arc::new(NoWake)).unwrap();
    Some((partition, vcpu, avx))
}

fn canonical() -> impl Strategy<Value = u64> {
    any::<u64>().prop_map(|n| ((n << 16) as i64 >> 16) as u64)
}

fn data_segment() -> impl Strategy<Value = Segment> {
    (any::<u16>(), canonical(), any::<u32>()).prop_map(|(selector, base, limit)| Segment {
        selector: selector | 3,
        attributes: SegmentAttributes(0xCF3),
        limit: limit | 0xFFF,
        base: base & 0xFFFF_FFFF,
        unusable: false,
    })
}

/// What 64-bit user code leaves behind, with everything random that may be.
fn long_mode() -> impl Strategy<Value = VcpuState> {
    let registers = (any::<[u64; 16]>(), canonical(), any::<u64>(), canonical(), any::<[u32; 4]>());
    let segments = (
        [data_segment(), data_segment(), data_segment(), data_segment()],
        canonical(),
        canonical(),
        canonical(),
        any::<u16>(),
    );
    let extended = (
        any::<[(u64, u16); 8]>(),
        any::<(u16, u16, u8, u16)>(),
        canonical(),
        any::<[[u64; 2]; 16]>(),
        any::<[[u64; 2]; 16]>(),
        any::<u16>(),
    );
    let rest = (0..4u8, 0..3u8, any::<[bool; 2]>(), 0..4u8, any::<u32>(), canonical());
    (registers, segments, extended, rest).prop_map(|(registers, segments, extended, rest)| {
        let mut s = VcpuState::default();
        let (gpr, rip, flags, cr2, dr) = registers;
        (s.gpr, s.rip, s.cr2) = (gpr, rip, cr2);
        s.rflags = flags & 0x21_4ED5 | 2;
        s.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
        s.cr4 = CR4_PAE | CR4_PGE | CR4_OSFXSR | CR4_OSXMMEXCPT;
        (s.cr3, s.efer) = (0x1000, EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE);
        let debug: Vec<u64> = dr.iter().map(|n| u64::from(*n)).collect();
        s.dr = [debug[0], debug[1], debug[2], debug[3], DR6_FIXED_1 | 3, DR7_FIXED_1 | 0x55];
        set_segments(&mut s, segments);
        set_extended(&mut s, extended);
        set_rest(&mut s, rest);
        s
    })
}

fn set_segments(s: &mut VcpuState, from: ([Segment; 4], u64, u64, u64, u16)) {
    let ([es, ss, ds, fs], fs_base, gs_base, table, limit) = from;
    let code = Segment { selector: 0x33, attributes: SegmentAttributes(0xAFB), base: 0, ..es };
    s.segments = [es, code, ss, ds, Segment { base: fs_base, ..fs }, Segment { base: gs_base, ..es }];
    s.ldtr = Segment { selector: 0, attributes: SegmentAttributes(0), limit: 0, base: 0, unusable: true };
    s.tr = Segment {
        selector: 0x40,
        attributes: SegmentAttributes(0x8B),
        limit: 0x67,
        base: gs_base,
        unusable: false,
    };
    s.gdtr = DescriptorTable { base: table, limit };
    s.idtr = DescriptorTable { base: table ^ 0x1000, limit: 0xFFF };
    s.msrs = vec![
        (msr::SPEC_CTRL, 1),
        (msr::SYSENTER_EIP, table),
        (msr::PAT, 0x0007_0406_0007_0406),
        (msr::STAR, u64::from(limit) << 32),
        (msr::LSTAR, gs_base),
        (msr::KERNEL_GS_BASE, fs_base),
        (msr::TSC_AUX, limit.into()),
    ];
    s.msrs.retain(|(_, value)| *value != 0);
    s.msrs.sort_unstable();
}

type Extended = ([(u64, u16); 8], (u16, u16, u8, u16), u64, [[u64; 2]; 16], [[u64; 2]; 16], u16);

fn set_extended(s: &mut VcpuState, from: Extended) {
    let (stack, (control, status, in_use, opcode), pointer, xmm, ymm, mxcsr) = from;
    s.x87.registers = stack.map(|(mantissa, sign_exponent)| Float80 { mantissa, sign_exponent });
    s.x87.control = control & 0xF3F | 0x40;
    // ES and B follow the exception flags, all masked here or none raised.
    (s.x87.status, s.x87.in_use) = (status & 0x7F00, in_use);
    s.x87.opcode = opcode & 0x7FF;
    (s.x87.instruction_pointer, s.x87.data_pointer) = (pointer, pointer ^ 0x10);
    s.sse.xmm = xmm;
    s.sse.mxcsr = u32::from(mxcsr);
    s.avx = ymm;
    s.xcr0 = XCR0_X87 | XCR0_SSE | XCR0_AVX;
}

fn set_rest(s: &mut VcpuState, from: (u8, u8, [bool; 2], u8, u32, u64)) {
    let (run_state, shadow, [nmi_pending, nmi_blocked], event, code, address) = from;
    s.run_state = [RunState::Running, RunState::Halted, RunState::WaitForSipi, RunState::Shutdown]
        [usize::from(run_state)];
    s.shadow = [InterruptShadow::None, InterruptShadow::Sti, InterruptShadow::MovSs][usize::from(shadow)];
    (s.nmi_pending, s.nmi_blocked) = (nmi_pending, nmi_blocked);
    if s.run_state != RunState::Running {
        (s.shadow, s.nmi_pending) = (InterruptShadow::None, false);
        return;
    }
    let pending =
        |exception, error_code, is_trap| Some(PendingEvent { exception, error_code, address: 0, is_trap });
    match event {
        0 => {}
        1 => {
            s.cr2 = address;
            let event = pending(Exception::PageFault, Some(code & 0x1F), false);
            s.exception = event.map(|e| PendingEvent { address, ..e });
        }
        2 => s.exception = pending(Exception::GeneralProtection, Some(code & 0xFFFF), false),
        _ => s.interrupt = Some(code as u8 | 0x20),
    }
}

/// A local APIC with everything random that KVM keeps as it is; its timer does not run.
fn apic(power_up: &VcpuState) -> impl Strategy<Value = ApicState> + use<> {
    let power_up: ApicState = from_blob(power_up.apic.as_ref().unwrap()).unwrap();
    let registers = (any::<u8>(), any::<u32>(), any::<u32>(), any::<bool>(), any::<bool>());
    let bits = (any::<[u32; 8]>(), any::<[u32; 8]>(), any::<[u32; 8]>());
    (registers, bits, any::<[u8; 6]>(), any::<u64>()).prop_map(move |(registers, bits, vectors, icr)| {
        let (tpr, ldr, dfr, enabled, x2apic) = registers;
        // Vectors below 16 are none.
        let legal = |mut bits: [u32; 8]| {
            bits[0] &= 0xFFFF_0000;
            bits
        };
        let mode = if x2apic { msr::APIC_BASE_ENABLE | msr::APIC_BASE_X2APIC } else { msr::APIC_BASE_ENABLE };
        let mut state = ApicState {
            base: apic::DEFAULT_BASE | mode,
            tpr,
            ldr: if x2apic { 0 } else { ldr & 0xFF00_0000 },
            dfr: if x2apic { u32::MAX } else { dfr | 0x0FFF_FFFF },
            svr: 0xF0 | u32::from(enabled) << 8,
            isr: legal(bits.0),
            tmr: legal(bits.1),
            irr: legal(bits.2),
            icr: icr & 0xFF00_0000_000C_CFFF,
            ..power_up.clone()
        };
        for (entry, vector) in state.lvt.iter_mut().zip(vectors) {
            *entry = 1 << 16 | u32::from(vector);
        }
        state
    })
}

/// The same in protected mode with tables of 32-bit PAE, in real mode, or as it is.
fn in_mode(mode: u8, mut s: VcpuState) -> VcpuState {
    if mode == 0 {
        return s;
    }
    for segment in &mut s.segments {
        let kind = if segment.attributes.kind() & 8 != 0 { 0xB } else { 3 };
        (segment.base, segment.limit) = (segment.base & 0xF_FFF0, 0xFFFF);
        // Without G: on AMD's processors KVM has it by the limit, below 1 MiB clear (kvm/svm/svm.c, svm_get_segment).
        segment.attributes = SegmentAttributes(if mode == 1 { 0x4F0 | kind } else { 0x0F0 | kind });
    }
    let low = |n: &mut u64| *n &= 0xFFFF_FFFF;
    s.gpr.iter_mut().chain([&mut s.rip, &mut s.cr2]).for_each(low);
    s.gpr[8..].fill(0);
    (s.efer, s.rflags) = (EFER_NXE, s.rflags & !0x2_0000);
    if mode == 1 {
        s.pdpte = [0x2001, 0, 0x3001, 0];
    } else {
        (s.cr0, s.cr3, s.cr4) = (CR0_ET | CR0_NE, 0, 0);
        s.exception = None;
    }
    if let Some(event) = s.exception.as_mut().filter(|e| e.exception == Exception::PageFault) {
        event.address &= 0xFFFF_FFFF;
    }
    s
}

#[test]
fn states_survive_kvm() {
    let Some((_partition, mut vcpu, avx)) = vcpu() else { return };
    let power_up = vcpu.save().unwrap();
    let vcpu = std::cell::RefCell::new(vcpu);
    let probe = KvmHypervisor::open().unwrap().probe().clone();
    let config = ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() };
    // Each is restored over the one before, whatever that was: the order of a restore matters.
    proptest!(config, |(state in long_mode(), apic in apic(&power_up), mode in 0..3u8)| {
        let mut apic = apic;
        if let Some(vector) = state.interrupt {
            // Acknowledged and in service it would go back into the requests.
            apic.isr[usize::from(vector / 32)] &= !(1 << (vector % 32));
        }
        let mut state = VcpuState {
            tsc_offset: power_up.tsc_offset,
            apic: Some(to_blob(&apic)),
            ..in_mode(mode, state)
        };
        if !avx {
            state.xcr0 = XCR0_X87 | XCR0_SSE;
            state.avx = [[0; 2]; 16];
        }
        let taken = vcpu.borrow_mut().restore(&state);
        // Whoever has no paging of 32 bits says so, here as in the probe.
        if mode == 1 && !probe.problems.is_empty() && taken.is_err() {
            return Ok(());
        }
        taken.unwrap();
        let mut back = vcpu.borrow_mut().save().unwrap();
        // What KVM gives beyond: fixed bits of machine-check MSRs and the like, which were there before.
        back.msrs.retain(|(number, _)| state.msrs.iter().any(|(n, _)| n == number));
        let seen: ApicState = from_blob(back.apic.as_ref().unwrap()).unwrap();
        prop_assert_eq!(seen, apic);
        back.apic.clone_from(&state.apic);
        // AMD's processors have one interrupt shadow for both (APM 2, 15.21.5).
        if let (InterruptShadow::MovSs, InterruptShadow::Sti) = (back.shadow, state.shadow) {
            back.shadow = InterruptShadow::Sti;
        }
        prop_assert_eq!(back, state);
    });
}

/// AMD's processors let any program set MXCSR.MM, which the CPU models lack: a state with it could not be restored.
#[test]
fn what_no_cpu_model_has_in_mxcsr_is_not_saved() {
    let mut area = kvm_xsave::default();
    extended::write(&VcpuState::default(), &mut area);
    area.region[x86_defs::xsave::MXCSR / 4] = 0x2_1F81;
    let mut state = VcpuState::default();
    extended::read(&mut state, &area);
    assert_eq!(state.sse.mxcsr, 0x1F81);
}

/// The software engine's state after power-up is KVM's, too.
#[test]
fn power_up_is_the_same_everywhere() {
    let Some((_partition, mut vcpu, _)) = vcpu() else { return };
    let first = vcpu.save().unwrap();
    vcpu.restore(&VcpuState { rip: 5, ..first.clone() }).unwrap();
    vcpu.reset();
    let again = vcpu.save().unwrap();
    assert_eq!(VcpuState { tsc_offset: 0, ..again }, VcpuState { tsc_offset: 0, ..first.clone() });
    let default = VcpuState::default();
    assert_eq!(
        (first.rip, first.cr0, first.segments, first.tr, first.rflags),
        (default.rip, default.cr0, default.segments, default.tr, default.rflags,)
    );
    assert_eq!(first.run_state, RunState::WaitForSipi);
}
