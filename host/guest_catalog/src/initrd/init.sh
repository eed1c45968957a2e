#!/bin/busybox sh
# The init of Bedplate's test guests: says that it has booted, does what the kernel command line asks for
# (bedplate.VERB=ARGUMENTS, in order), then gives a shell. See docs/benchmarks.md and tests/guest_trials.
#
#   bedplate.checksum=ROUNDS,KIB    chained sha256 over a pool of KIB in RAM; prints each round and the final sum
#   bedplate.blk=KIB[,DEVICE]       writes a pattern to a disk, reads it back, compares
#   bedplate.net=dhcp               brings eth0 up
#   bedplate.net=fetch,URL          ... and fetches a file, prints its sum
#   bedplate.net=serve,PORT,KIB     ... and serves a file of that size, prints its sum
#   bedplate.net=address,A.B.C.D/N  ... and gives it one more address
#   bedplate.net=reach,A.B.C.D,PORT ... and waits until a program there takes a connection
#   bedplate.net=listen,PORT        ... and waits for a connection
#   bedplate.busy=disk[,KIB[,DEVICE]] or net,URL   the same in the background, until the last checksum round
#   bedplate.selftests              runs Linux' own x86 tests, if they are inside
#   bedplate.poweroff | bedplate.reboot | bedplate.panic

/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt /root /sbin /usr/bin /usr/sbin /var/run
/bin/busybox --install -s
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=vt100
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
echo "BEDPLATE-MARKER init reached"
uname -a
grep -m1 '^model name' /proc/cpuinfo
# From here on kernel messages below "error" stay off the console, so that lines do not mix.
echo 4 > /proc/sys/kernel/printk

. /lib/bedplate/verbs.sh
load_modules
echo "BEDPLATE-READY $(nproc) cpus"

for word in $(cat /proc/cmdline); do
    case "$word" in
        bedplate.checksum=*) checksum "${word#*=}" ;;
        bedplate.checksum) checksum 64,256 ;;
        bedplate.blk=*) blk "${word#*=}" ;;
        bedplate.net=*) net "${word#*=}" ;;
        bedplate.busy=*) busy "${word#*=}" ;;
        bedplate.selftests) selftests ;;
        bedplate.poweroff) poweroff -f ;;
        bedplate.reboot) reboot -f ;;
        bedplate.panic) echo c > /proc/sysrq-trigger ;;
        bedplate.*) echo "BEDPLATE-UNKNOWN $word" ;;
    esac
done
echo "BEDPLATE-SHELL"
cd /root
# A shell that ends is started again: the guest stops by `poweroff -f`.
while true; do
    setsid cttyhack sh
done
