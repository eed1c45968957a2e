#!/bin/sh
# Builds Linux' own tests of x86 (tools/testing/selftests/x86) against a C library unpacked from packages.
# selftests.sh SOURCE.tar.xz WORK SYSROOT OUT WIDTHS   (WIDTHS: "32" or "32 64")
# Which test is built how: that folder's Makefile. amx is left out: no CPU model of ours has AMX, and it fails
# without instead of skipping.
set -eu
archive=$1 work=$2 sysroot=$3 out=$4 widths=$5

tar -C "$work" -xJf "$archive" --strip-components=1 --wildcards \
    '*/tools/testing/selftests/x86/*' '*/tools/testing/selftests/kselftest*.h' '*/arch/x86/include/asm/desc_defs.h'
cd "$work/tools/testing/selftests/x86"
mkdir -p "$out"

# Links of the packages lead to the root of the host: let them lead to ours.
find "$sysroot" -type l -lname '/*' | while read -r link; do
    ln -sf "$sysroot$(readlink "$link")" "$link"
done

both="single_step_syscall sysret_ss_attrs syscall_nt test_mremap_vdso check_initial_reg_state sigreturn iopl ioperm
    test_vsyscall mov_ss_trap sigtrap_loop syscall_arg_fault fsgsbase_restore sigaltstack ldt_gdt ptrace_syscall"
only32="entry_from_vm86 test_syscall_vdso unwind_vdso test_FCMOV test_FCOMI test_FISTTP vdso_restorer"
only64="fsgsbase sysret_rip syscall_numbering corrupt_xstate_header"
gcc_folder=$(echo "$sysroot"/usr/lib/gcc/x86_64-linux-gnu/[0-9]*)

build() {
    name=$1 width=$2
    more=
    case "$name-$width" in
        ptrace_syscall-32) more=raw_syscall_helper_32.S ;;
        test_syscall_vdso-32) more=thunks_32.S ;;
        sysret_ss_attrs-64) more=thunks.S ;;
        check_initial_reg_state-*) more="-Wl,-ereal_start -static" ;;
    esac
    case "$width" in
        32) where="-B$gcc_folder/32/ -L$gcc_folder/32 -B$sysroot/usr/lib32/" ;;
        64) where="-B$gcc_folder/ -B$sysroot/usr/lib/x86_64-linux-gnu/" ;;
    esac
    # shellcheck disable=SC2086
    gcc "-m$width" --sysroot="$sysroot" $where -idirafter "$sysroot/usr/include/x86_64-linux-gnu" \
        -O2 -std=gnu99 -pthread -w -no-pie -static-libgcc -DCAN_BUILD_32 -DCAN_BUILD_64 \
        -o "$out/${name}_$width" "$name.c" $more -lrt -ldl -lm
}

for width in $widths; do
    eval "only=\$only$width"
    for name in $both $only; do
        echo "${name}_$width"
        build "$name" "$width"
    done
done
