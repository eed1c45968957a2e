//! To and from the engine-neutral `VcpuState`.

use crate::run::SoftVcpu;
use crate::shared::attention;
use core::sync::atomic::Ordering::SeqCst;
use hypervisor::VcpuState;
use hypervisor::state::{Float80, InterruptShadow, PendingEvent, RunState, SseState, X87State};
use saved_state::RestoreError;
use x86_defs::{Exception, SegmentIndex, msr};
use x86_emulate::Cpu;
use x86_emulate::cpu::{ExtendedState, F80, Msrs, PendingException, RIP, X87};
use x86_emulate::flags::LazyFlags;

/// DR6 bits of debug traps: breakpoints, single step, task switch.
const DR6_TRAPS: u64 = 0xC00F;

/// Every MSR that is plain storage, with its place.
fn each_msr(m: &mut Msrs, mut f: impl FnMut(u32, &mut u64)) {
    let Msrs {
        star,
        lstar,
        cstar,
        sfmask,
        kernel_gs_base,
        sysenter_cs,
        sysenter_esp,
        sysenter_eip,
        pat,
        tsc_aux,
        misc_enable,
        spec_ctrl,
        debugctl,
        xss,
        misc_features_enables,
        mcg_status,
        mtrr_def_type,
        mtrr_fixed,
        mtrr_variable,
        mc_banks,
    } = m;
    for (number, place) in [
        (msr::STAR, star),
        (msr::LSTAR, lstar),
        (msr::CSTAR, cstar),
        (msr::SFMASK, sfmask),
        (msr::KERNEL_GS_BASE, kernel_gs_base),
        (msr::SYSENTER_CS, sysenter_cs),
        (msr::SYSENTER_ESP, sysenter_esp),
        (msr::SYSENTER_EIP, sysenter_eip),
        (msr::PAT, pat),
        (msr::TSC_AUX, tsc_aux),
        (msr::MISC_ENABLE, misc_enable),
        (msr::SPEC_CTRL, spec_ctrl),
        (msr::DEBUGCTL, debugctl),
        (msr::XSS, xss),
        (msr::MISC_FEATURES_ENABLES, misc_features_enables),
        (msr::MCG_STATUS, mcg_status),
        (msr::MTRR_DEF_TYPE, mtrr_def_type),
    ] {
        f(number, place);
    }
    const FIXED: [u32; 11] = [
        msr::MTRR_FIX64K_00000,
        msr::MTRR_FIX16K_80000,
        msr::MTRR_FIX16K_A0000,
        msr::MTRR_FIX4K_C0000,
        msr::MTRR_FIX4K_C0000 + 1,
        msr::MTRR_FIX4K_C0000 + 2,
        msr::MTRR_FIX4K_C0000 + 3,
        msr::MTRR_FIX4K_C0000 + 4,
        msr::MTRR_FIX4K_C0000 + 5,
        msr::MTRR_FIX4K_C0000 + 6,
        msr::MTRR_FIX4K_F8000,
    ];
    FIXED.into_iter().zip(mtrr_fixed).for_each(|(n, place)| f(n, place));
    (msr::MTRR_PHYSBASE0..).zip(mtrr_variable).for_each(|(n, place)| f(n, place));
    (msr::MC0_CTL..).zip(mc_banks.iter_mut().flatten()).for_each(|(n, place)| f(n, place));
}

impl SoftVcpu {
    /// The state now; nothing of it is in flight, since blocks have ended.
    pub(crate) fn state(&self) -> VcpuState {
        let core = &self.core;
        let cpu = &core.cpu;
        let mut msrs = alloc::vec::Vec::new();
        each_msr(&mut cpu.msrs.clone(), |number, value| {
            if *value != 0 {
                msrs.push((number, *value));
            }
        });
        for (number, value) in [
            (msr::KVM_SYSTEM_TIME_NEW, core.msr.kvm_system_time),
            (msr::KVM_WALL_CLOCK_NEW, core.msr.kvm_wall_clock),
        ] {
            if value != 0 {
                msrs.push((number, value));
            }
        }
        msrs.sort_unstable();
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&cpu.gpr[..16]);
        VcpuState {
            gpr,
            rip: cpu.gpr[RIP],
            rflags: cpu.rflags_all(),
            segments: cpu.seg,
            ldtr: cpu.ldtr,
            tr: cpu.tr,
            gdtr: cpu.gdtr,
            idtr: cpu.idtr,
            cr0: cpu.cr0,
            cr2: cpu.cr2,
            cr3: cpu.cr3,
            cr4: cpu.cr4,
            efer: cpu.efer,
            xcr0: cpu.xcr0,
            dr: [cpu.dr[0], cpu.dr[1], cpu.dr[2], cpu.dr[3], cpu.dr[6], cpu.dr[7]],
            pdpte: cpu.pdpte,
            msrs,
            x87: save_x87(&cpu.x.x87),
            sse: SseState { xmm: cpu.x.ymm.map(|r| [r[0], r[1]]), mxcsr: cpu.x.mxcsr },
            avx: cpu.x.ymm.map(|r| [r[2], r[3]]),
            apic: Some(core.apic.save()),
            run_state: match (self.wait_for_sipi, self.shutdown, cpu.halted) {
                (true, ..) => RunState::WaitForSipi,
                (_, true, _) => RunState::Shutdown,
                (_, _, true) => RunState::Halted,
                _ => RunState::Running,
            },
            shadow: match (cpu.interrupt_shadow, cpu.shadow_blocks_debug) {
                (false, _) => InterruptShadow::None,
                (true, false) => InterruptShadow::Sti,
                (true, true) => InterruptShadow::MovSs,
            },
            nmi_pending: self.nmi_pending,
            nmi_blocked: cpu.nmi_blocked,
            exception: waiting(cpu).map(|(exception, exc)| PendingEvent {
                exception,
                error_code: exception.has_error_code().then_some(exc.error_code),
                address: exc.address,
                is_trap: exc.is_trap,
            }),
            interrupt: self.interrupt,
            tsc_offset: core.apic.clock().tsc_offset,
            tsc_adjust: core.msr.tsc_adjust,
            tsc_deadline: 0,
        }
    }

    /// Takes over `state`. The local APIC is checked first; nothing changes if it refuses.
    pub(crate) fn set_state(&mut self, state: &VcpuState) -> Result<(), RestoreError> {
        let core = &mut *self.core;
        if let Some(blob) = &state.apic {
            core.apic.restore(blob)?;
        } else {
            core.apic.reset();
        }
        core.apic.set_tsc_offset(state.tsc_offset);
        let cpu = &mut core.cpu;
        *cpu = Cpu::default();
        cpu.gpr[..16].copy_from_slice(&state.gpr);
        cpu.gpr[RIP] = state.rip;
        cpu.seg = state.segments;
        cpu.cpl = if state.cr0 & x86_defs::control::CR0_PE == 0 {
            0
        } else if state.rflags & x86_defs::flags::VM != 0 {
            3
        } else {
            state.segments[SegmentIndex::Ss as usize].attributes.dpl()
        };
        (cpu.ldtr, cpu.tr, cpu.gdtr, cpu.idtr) = (state.ldtr, state.tr, state.gdtr, state.idtr);
        (cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
        (cpu.efer, cpu.xcr0, cpu.pdpte) = (state.efer, state.xcr0, state.pdpte);
        let [dr0, dr1, dr2, dr3, dr6, dr7] = state.dr;
        cpu.dr = [dr0, dr1, dr2, dr3, 0, 0, dr6, dr7];
        cpu.flags = LazyFlags::from_bits(state.rflags);
        cpu.rflags =
            state.rflags & x86_defs::flags::ALL & !x86_defs::flags::STATUS | x86_defs::flags::FIXED_1;
        cpu.msrs = Msrs::default();
        let find = |number: u32| state.msrs.iter().find(|(n, _)| *n == number).map_or(0, |(_, v)| *v);
        each_msr(&mut cpu.msrs, |number, place| *place = find(number));
        cpu.x = ExtendedState {
            ymm: [[0; 4]; 16],
            mxcsr: state.sse.mxcsr & x86_defs::flags::MXCSR_MASK,
            x87: load_x87(&state.x87),
        };
        for (ymm, (low, high)) in cpu.x.ymm.iter_mut().zip(state.sse.xmm.iter().zip(&state.avx)) {
            *ymm = [low[0], low[1], high[0], high[1]];
        }
        cpu.halted = state.run_state == RunState::Halted;
        cpu.interrupt_shadow = state.shadow != InterruptShadow::None;
        cpu.shadow_blocks_debug = state.shadow == InterruptShadow::MovSs;
        cpu.nmi_blocked = state.nmi_blocked;
        match state.exception {
            // A debug trap respects the shadow of a load of SS.
            Some(e) if e.exception == Exception::Debug && e.is_trap => {
                cpu.pending_debug = e.address & DR6_TRAPS
            }
            Some(e) => {
                cpu.exc = PendingException {
                    vector: Some(e.exception),
                    error_code: e.error_code.unwrap_or(0),
                    address: e.address,
                    is_trap: e.is_trap,
                }
            }
            None => {}
        }
        cpu.refresh();
        core.msr.tsc_adjust = state.tsc_adjust;
        core.msr.kvm_system_time = find(msr::KVM_SYSTEM_TIME_NEW);
        core.msr.kvm_wall_clock = find(msr::KVM_WALL_CLOCK_NEW);
        core.publish_kvmclock(true);
        core.me.attention.fetch_or(attention::IRQ, SeqCst);
        self.wait_for_sipi = state.run_state == RunState::WaitForSipi;
        self.shutdown = state.run_state == RunState::Shutdown;
        self.nmi_pending = state.nmi_pending;
        self.interrupt = state.interrupt;
        self.forget_code();
        Ok(())
    }
}

/// What waits to be delivered: an exception, or a debug trap.
fn waiting(cpu: &Cpu) -> Option<(Exception, PendingException)> {
    if let Some(exception) = cpu.exc.vector {
        return Some((exception, cpu.exc));
    }
    let address = cpu.pending_debug & DR6_TRAPS;
    let trap = PendingException { vector: Some(Exception::Debug), error_code: 0, address, is_trap: true };
    (address != 0).then_some((Exception::Debug, trap))
}

fn save_x87(x: &X87) -> X87State {
    X87State {
        registers: x.regs.map(|r| Float80 { mantissa: r.mantissa, sign_exponent: r.sign_exponent }),
        control: x.control,
        status: x.status,
        in_use: x.in_use,
        opcode: x.opcode,
        instruction_pointer: x.instruction_pointer,
        instruction_selector: x.instruction_selector,
        data_pointer: x.data_pointer,
        data_selector: x.data_selector,
    }
}

/// The summary bit follows from flags and masks: were it stale, the host would raise what the guest has
/// pending.
fn load_x87(x: &X87State) -> X87 {
    let mut unit = X87 {
        regs: x.registers.map(|r| F80 { mantissa: r.mantissa, sign_exponent: r.sign_exponent }),
        in_use: x.in_use,
        opcode: x.opcode,
        instruction_pointer: x.instruction_pointer,
        instruction_selector: x.instruction_selector,
        data_pointer: x.data_pointer,
        data_selector: x.data_selector,
        ..X87::default()
    };
    unit.set_control(x.control);
    unit.set_status(x.status);
    unit
}
