//! Random states, into KVM and back.

use crate::engine::KvmHypervisor;
use guest_memory::GuestRam;
use guest_time::GuestClock;
use hypervisor::state::{Float80, InterruptShadow, PendingEvent, RunState};
use hypervisor::{CpuModel, Hypervisor, Partition, PartitionLayout, Vcpu, VcpuState, Wake};
use proptest::prelude::*;
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

#[test]
fn states_survive_kvm() {
    let Some((_partition, mut vcpu, avx)) = vcpu() else { return };
    let power_up = vcpu.save().unwrap();
    let vcpu = std::cell::RefCell::new(vcpu);
    let config = ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(state in long_mode())| {
        let mut state = VcpuState {
            tsc_offset: power_up.tsc_offset,
            apic: power_up.apic.clone(),
            ..state
        };
        if !avx {
            state.xcr0 = XCR0_X87 | XCR0_SSE;
            state.avx = [[0; 2]; 16];
        }
        vcpu.borrow_mut().restore(&state).unwrap();
        let mut back = vcpu.borrow_mut().save().unwrap();
        // What KVM gives beyond: fixed bits of machine-check MSRs and the like, which were there before.
        back.msrs.retain(|(number, _)| state.msrs.iter().any(|(n, _)| n == number));
        prop_assert_eq!(back, state);
    });
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
