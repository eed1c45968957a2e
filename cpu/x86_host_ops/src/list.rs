//! The list of kernels, by shape. A kernel is one instruction on vector registers that reads operands `a`,
//! `b` (and `c` or an immediate) and writes one register.
//!
//! `kernel_list!(callback)` hands the list to a macro: `kernel` makes the thunks of it, `x86_emulate` maps
//! mnemonics with it. An entry is the legacy mnemonic and the VEX one, where both exist and do the same; names
//! are iced's.
//!
//! Environment of a group: `int` does not touch MXCSR; the others do, and say where a tiny result may stand:
//! `ps`, `pd` in any lane, `ss`, `sd` in the lowest lane, `fp` nowhere.

/// See the module's header.
#[macro_export]
macro_rules! kernel_list {
    ($callback:ident) => { $callback! {
        // op a, b: MMX, XMM and YMM.
        mmx_binary int {
            Packssdw Vpackssdw, Packsswb Vpacksswb, Packuswb Vpackuswb,
            Paddb Vpaddb, Paddw Vpaddw, Paddd Vpaddd, Paddq Vpaddq,
            Paddsb Vpaddsb, Paddsw Vpaddsw, Paddusb Vpaddusb, Paddusw Vpaddusw,
            Psubb Vpsubb, Psubw Vpsubw, Psubd Vpsubd, Psubq Vpsubq,
            Psubsb Vpsubsb, Psubsw Vpsubsw, Psubusb Vpsubusb, Psubusw Vpsubusw,
            Pand Vpand, Pandn Vpandn, Por Vpor, Pxor Vpxor,
            Pavgb Vpavgb, Pavgw Vpavgw,
            Pcmpeqb Vpcmpeqb, Pcmpeqw Vpcmpeqw, Pcmpeqd Vpcmpeqd,
            Pcmpgtb Vpcmpgtb, Pcmpgtw Vpcmpgtw, Pcmpgtd Vpcmpgtd,
            Pmaxsw Vpmaxsw, Pmaxub Vpmaxub, Pminsw Vpminsw, Pminub Vpminub,
            Pmaddwd Vpmaddwd, Pmulhuw Vpmulhuw, Pmulhw Vpmulhw, Pmullw Vpmullw, Pmuludq Vpmuludq,
            Psadbw Vpsadbw, Pmaddubsw Vpmaddubsw, Pmulhrsw Vpmulhrsw,
            Punpckhbw Vpunpckhbw, Punpckhwd Vpunpckhwd, Punpckhdq Vpunpckhdq,
            Punpcklbw Vpunpcklbw, Punpcklwd Vpunpcklwd, Punpckldq Vpunpckldq,
            Phaddw Vphaddw, Phaddd Vphaddd, Phaddsw Vphaddsw,
            Phsubw Vphsubw, Phsubd Vphsubd, Phsubsw Vphsubsw,
            Pshufb Vpshufb, Psignb Vpsignb, Psignw Vpsignw, Psignd Vpsignd,
        }
        mmx_unary int { Pabsb Vpabsb, Pabsw Vpabsw, Pabsd Vpabsd, }
        // The count is 128 bits wide also in the YMM form.
        mmx_shift int {
            Psllw Vpsllw, Pslld Vpslld, Psllq Vpsllq, Psraw Vpsraw, Psrad Vpsrad,
            Psrlw Vpsrlw, Psrld Vpsrld, Psrlq Vpsrlq,
        }
        mmx_binary_imm int { Palignr Vpalignr, }
        mmx_only_unary_imm int { Pshufw, }

        binary int {
            Packusdw Vpackusdw, Pcmpeqq Vpcmpeqq, Pcmpgtq Vpcmpgtq,
            Pmaxsb Vpmaxsb, Pmaxsd Vpmaxsd, Pmaxud Vpmaxud, Pmaxuw Vpmaxuw,
            Pminsb Vpminsb, Pminsd Vpminsd, Pminud Vpminud, Pminuw Vpminuw,
            Pmuldq Vpmuldq, Pmulld Vpmulld, Punpckhqdq Vpunpckhqdq, Punpcklqdq Vpunpcklqdq,
            Andps Vandps, Andpd Vandpd, Andnps Vandnps, Andnpd Vandnpd,
            Orps Vorps, Orpd Vorpd, Xorps Vxorps, Xorpd Vxorpd,
            Unpckhps Vunpckhps, Unpckhpd Vunpckhpd, Unpcklps Vunpcklps, Unpcklpd Vunpcklpd,
            Aesenc Vaesenc, Aesenclast Vaesenclast, Aesdec Vaesdec, Aesdeclast Vaesdeclast,
            Gf2p8mulb Vgf2p8mulb,
        }
        unary int {
            Movddup Vmovddup, Movshdup Vmovshdup, Movsldup Vmovsldup,
            Rcpps Vrcpps, Rsqrtps Vrsqrtps,
        }
        xmm_binary int {
            Rcpss Vrcpss, Rsqrtss Vrsqrtss,
            Sha1msg1, Sha1msg2, Sha1nexte, Sha256msg1, Sha256msg2,
        }
        xmm_unary int { Aesimc Vaesimc, Phminposuw Vphminposuw, }
        // YMM from XMM.
        widen int {
            Pmovsxbw Vpmovsxbw, Pmovsxbd Vpmovsxbd, Pmovsxbq Vpmovsxbq,
            Pmovsxwd Vpmovsxwd, Pmovsxwq Vpmovsxwq, Pmovsxdq Vpmovsxdq,
            Pmovzxbw Vpmovzxbw, Pmovzxbd Vpmovzxbd, Pmovzxbq Vpmovzxbq,
            Pmovzxwd Vpmovzxwd, Pmovzxwq Vpmovzxwq, Pmovzxdq Vpmovzxdq,
        }
        vex_binary int { Vpsllvd, Vpsllvq, Vpsravd, Vpsrlvd, Vpsrlvq, Vpermilps, Vpermilpd, }
        ymm_binary int { Vpermd, Vpermps, }

        unary_imm int { Pshufd Vpshufd, Pshufhw Vpshufhw, Pshuflw Vpshuflw, }
        binary_imm int {
            Blendpd Vblendpd, Blendps Vblendps, Pblendw Vpblendw, Shufps Vshufps, Shufpd Vshufpd,
            Mpsadbw Vmpsadbw, Pclmulqdq Vpclmulqdq,
            Gf2p8affineqb Vgf2p8affineqb, Gf2p8affineinvqb Vgf2p8affineinvqb,
        }
        xmm_unary_imm int { Aeskeygenassist Vaeskeygenassist, }
        xmm_binary_imm int { Insertps Vinsertps, Sha1rnds4, }
        vex_binary_imm int { Vpblendd, }
        ymm_binary_imm int { Vperm2f128, Vperm2i128, }
        ymm_unary_imm int { Vpermq, Vpermpd, }

        // `c` chooses; XMM0 in the legacy form.
        blend int { Pblendvb Vpblendvb, Blendvps Vblendvps, Blendvpd Vblendvpd, }
        xmm_blend int { Sha256rnds2, }

        binary ps {
            Addps Vaddps, Subps Vsubps, Mulps Vmulps, Divps Vdivps,
            Addsubps Vaddsubps, Haddps Vhaddps, Hsubps Vhsubps,
        }
        binary pd {
            Addpd Vaddpd, Subpd Vsubpd, Mulpd Vmulpd, Divpd Vdivpd,
            Addsubpd Vaddsubpd, Haddpd Vhaddpd, Hsubpd Vhsubpd,
        }
        xmm_binary ss { Addss Vaddss, Subss Vsubss, Mulss Vmulss, Divss Vdivss, Cvtsd2ss Vcvtsd2ss, }
        xmm_binary sd { Addsd Vaddsd, Subsd Vsubsd, Mulsd Vmulsd, Divsd Vdivsd, }
        binary fp { Minps Vminps, Minpd Vminpd, Maxps Vmaxps, Maxpd Vmaxpd, }
        xmm_binary fp {
            Minss Vminss, Minsd Vminsd, Maxss Vmaxss, Maxsd Vmaxsd,
            Sqrtss Vsqrtss, Sqrtsd Vsqrtsd, Cvtss2sd Vcvtss2sd,
        }
        unary fp {
            Sqrtps Vsqrtps, Sqrtpd Vsqrtpd,
            Cvtdq2ps Vcvtdq2ps, Cvtps2dq Vcvtps2dq, Cvttps2dq Vcvttps2dq,
        }
        widen fp { Cvtdq2pd Vcvtdq2pd, Cvtps2pd Vcvtps2pd, }
        // XMM from YMM.
        narrow ps { Cvtpd2ps Vcvtpd2ps, }
        narrow fp { Cvtpd2dq Vcvtpd2dq, Cvttpd2dq Vcvttpd2dq, }
        vex_widen fp { Vcvtph2ps, }
        vex_narrow_imm ph { Vcvtps2ph, }

        // The legacy comparisons have 8 predicates, the VEX ones 32.
        sse_binary_imm fp { Cmpps, Cmppd, Cmpss, Cmpsd, }
        vex_binary_imm fp { Vcmpps, Vcmppd, }
        vex_xmm_binary_imm fp { Vcmpss, Vcmpsd, }
        unary_imm fp { Roundps Vroundps, Roundpd Vroundpd, }
        xmm_binary_imm fp { Roundss Vroundss, Roundsd Vroundsd, }
        binary_imm ps { Dpps Vdpps, }
        xmm_binary_imm pd { Dppd Vdppd, }

        // `c` is the destination.
        fused ps {
            Vfmadd132ps, Vfmadd213ps, Vfmadd231ps, Vfmsub132ps, Vfmsub213ps, Vfmsub231ps,
            Vfnmadd132ps, Vfnmadd213ps, Vfnmadd231ps, Vfnmsub132ps, Vfnmsub213ps, Vfnmsub231ps,
            Vfmaddsub132ps, Vfmaddsub213ps, Vfmaddsub231ps, Vfmsubadd132ps, Vfmsubadd213ps, Vfmsubadd231ps,
        }
        fused pd {
            Vfmadd132pd, Vfmadd213pd, Vfmadd231pd, Vfmsub132pd, Vfmsub213pd, Vfmsub231pd,
            Vfnmadd132pd, Vfnmadd213pd, Vfnmadd231pd, Vfnmsub132pd, Vfnmsub213pd, Vfnmsub231pd,
            Vfmaddsub132pd, Vfmaddsub213pd, Vfmaddsub231pd, Vfmsubadd132pd, Vfmsubadd213pd, Vfmsubadd231pd,
        }
        xmm_fused ss {
            Vfmadd132ss, Vfmadd213ss, Vfmadd231ss, Vfmsub132ss, Vfmsub213ss, Vfmsub231ss,
            Vfnmadd132ss, Vfnmadd213ss, Vfnmadd231ss, Vfnmsub132ss, Vfnmsub213ss, Vfnmsub231ss,
        }
        xmm_fused sd {
            Vfmadd132sd, Vfmadd213sd, Vfmadd231sd, Vfmsub132sd, Vfmsub213sd, Vfmsub231sd,
            Vfnmadd132sd, Vfnmadd213sd, Vfnmadd231sd, Vfnmsub132sd, Vfnmsub213sd, Vfnmsub231sd,
        }
    } };
}
