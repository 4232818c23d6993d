# `make` alone lists the targets.
STEP := integration/step.sh
SOAK_SECONDS ?= 600
SEEDS ?= 20000
TIME ?= 60
CARGO_HOME ?= $(HOME)/.cargo
# Where `make install` installs: below DESTDIR, for packagers.
PREFIX ?= /usr/local
DESTDIR ?=
SYSCONFDIR ?= /etc
ZSH ?= $(PREFIX)/share/zsh/site-functions
TARGET := $(or $(CARGO_TARGET_DIR),target)

.DEFAULT_GOAL := help
# The targets share one target folder, two cores and the machine's loop devices.
.NOTPARALLEL:
.PHONY: help setup build release pages install uninstall copy deb reproducible coverage deny demo demo-remote test test-guests sim soak fuzz bench clean

help: ## list the targets
	@echo "vublk: a vhost-user-blk back-end. Targets:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: ## install the Debian packages that the tests need; unpack a QEMU and a guest kernel into .cache
	@integration/setup.sh

build: ## build the release binaries
	@cargo build --release

release: ## build the programs as they are shipped: without the paths of this machine in them
	@RUSTFLAGS="--remap-path-prefix=$(CURDIR)=vublk --remap-path-prefix=$(CARGO_HOME)=cargo \
		$(if $(CARGO_TARGET_DIR),--remap-path-prefix=$(CARGO_TARGET_DIR)=vublk/target)" \
		cargo build --release --locked --bins $(if $(JOBS),--jobs $(JOBS))

pages: ## write the man pages and the shell completions, from the command lines
	@cargo run --quiet --locked --example pages -- $(TARGET)/pages

# Where there is no cargo, as for root by sudo, what was built before is installed. BUILT=1: the programs that are there.
BUILT ?= $(if $(shell command -v cargo),,1)

install: $(if $(BUILT),,release pages) copy ## install into PREFIX (/usr/local), below DESTDIR
	@$(if $(DESTDIR),true,echo "installed into $(PREFIX). For the systemd units: systemd-sysusers && systemd-tmpfiles --create && systemctl daemon-reload")

# The units, and the file for managers of VMs, name the programs where they are installed.
INSTALLED = sed 's,/usr/bin/vublk,$(PREFIX)/bin/vublk,g; s,/usr/share/doc,$(PREFIX)/share/doc,g'
ROOT = $(DESTDIR)$(PREFIX)
DOC = $(ROOT)/share/doc/vublk
UNITS := vublk@.service vublk@.socket vublk.target vublk.slice
COPIES = bin/vublkd bin/vublk $(UNITS:%=lib/systemd/system/%) lib/sysusers.d/vublk.conf lib/tmpfiles.d/vublk.conf \
	share/man/man8/vublkd.8 share/man/man5/vublk.toml.5 share/bash-completion/completions/vublkd share/bash-completion/completions/vublk \
	share/fish/vendor_completions.d/vublkd.fish share/fish/vendor_completions.d/vublk.fish \
	share/qemu/vhost-user/50-vublk.json

copy:
	@[ -x $(TARGET)/release/vublkd ] && [ -d $(TARGET)/pages ] || \
		{ echo "nothing is built: run make release pages first, as a user who has cargo" >&2; exit 1; }
	@install -d $(ROOT)/bin $(ROOT)/lib/systemd/system $(ROOT)/share/man/man1 $(ROOT)/share/qemu/vhost-user \
		$(DOC)/examples $(DOC)/docs
	@install -m 0755 $(TARGET)/release/vublkd $(TARGET)/release/vublk $(ROOT)/bin
	@for unit in $(UNITS); do $(INSTALLED) dist/systemd/$$unit | \
		install -m 0644 /dev/stdin $(ROOT)/lib/systemd/system/$$unit || exit 1; done
	@install -D -m 0644 dist/systemd/vublk.sysusers $(ROOT)/lib/sysusers.d/vublk.conf
	@install -D -m 0644 dist/systemd/vublk.tmpfiles $(ROOT)/lib/tmpfiles.d/vublk.conf
	@install -D -m 0644 $(TARGET)/pages/man8/vublkd.8 $(ROOT)/share/man/man8/vublkd.8
	@install -D -m 0644 $(TARGET)/pages/man5/vublk.toml.5 $(ROOT)/share/man/man5/vublk.toml.5
	@install -m 0644 $(TARGET)/pages/man1/vublk*.1 $(ROOT)/share/man/man1
	@for program in vublkd vublk; do \
		install -D -m 0644 $(TARGET)/pages/bash/$$program.bash $(ROOT)/share/bash-completion/completions/$$program && \
		install -D -m 0644 $(TARGET)/pages/zsh/_$$program $(DESTDIR)$(ZSH)/_$$program && \
		install -D -m 0644 $(TARGET)/pages/fish/$$program.fish $(ROOT)/share/fish/vendor_completions.d/$$program.fish || exit 1; \
	done
	@$(INSTALLED) dist/qemu/50-vublk.json | install -m 0644 /dev/stdin $(ROOT)/share/qemu/vhost-user/50-vublk.json
	@install -D -m 0644 dist/apparmor/vublk $(DESTDIR)$(SYSCONFDIR)/apparmor.d/abstractions/vublk
	@install -m 0644 *.md LICENSE-* $(DOC)
	@install -m 0644 docs/*.md docs/top.txt $(DOC)/docs
	@install -m 0644 dist/systemd/examples/* $(DOC)/examples

uninstall: ## remove what `make install` installed; disks and their settings stay
	@rm -f $(COPIES:%=$(ROOT)/%) $(ROOT)/share/man/man1/vublk.1 $(ROOT)/share/man/man1/vublk-*.1 \
		$(DESTDIR)$(ZSH)/_vublkd $(DESTDIR)$(ZSH)/_vublk $(DESTDIR)$(SYSCONFDIR)/apparmor.d/abstractions/vublk
	@rm -rf $(DOC)

deb: $(if $(BUILT),,release pages) ## build a Debian package; the first time cargo-deb is built, which takes minutes
	@integration/deb.sh $(DEB)

reproducible: ## build the release twice, in two folders, and compare
	@integration/reproducible.sh

coverage: setup ## which lines of the data path and of the succession the tests reach; fails below 95 %
	@integration/coverage.py

deny: ## cargo-deny: licences, sources, duplicates, advisories; the first time it is built, which takes minutes
	@integration/deny.sh

demo: setup build ## a real Linux guest on a vublk disk, in about a minute
	@python3 integration/demo.py

demo-remote: setup build ## a guest on Ceph RBD: its OSD killed, its daemon killed, moved live to another host; half a minute
	@python3 integration/demo_remote.py

test: setup ## everything a change must pass
	@$(STEP) "format" cargo fmt --check
	@$(STEP) "clippy" cargo clippy --all-targets -- -D warnings
	@$(STEP) "supply" integration/supply.py
	@$(STEP) "build" cargo build --release
	@$(STEP) "tests" cargo test
	@$(STEP) "install" integration/install.py
	@$(STEP) "documents" integration/docs.py
	@$(STEP) "instructions" benches/turn_gate.py
	@$(STEP) "guests" integration/run.sh --subset

test-guests: setup build ## a representative half of the guest tests, in under 4 minutes
	@$(STEP) "guests" integration/run.sh --subset

soak: setup build ## the long version of it all: seeds, kills, power cuts, migrations, the guest matrix, in some two hours
	@integration/setup.sh roots
	@$(STEP) "deny" integration/deny.sh
	@$(STEP) "package" integration/install.py --deb
	@$(STEP) "reproducible" integration/reproducible.sh
	@$(STEP) "seeds" $(MAKE) sim SEEDS=200000
	@VUBLK_KILLS=1000 $(STEP) "kills" cargo test --release --test main killed -- --test-threads=1 --nocapture
	@VUBLK_KILLS=500 $(STEP) "network" cargo test --release --test main remote:: -- --test-threads=1 --nocapture
	@VUBLK_KILLS=2000 $(STEP) "ceph" cargo test --release --test main rbd:: -- --test-threads=1 --nocapture
	@VUBLK_KILLS=400 $(STEP) "ends" cargo test --release --test main -- --test-threads=1 --nocapture upgraded the_descriptor_store a_real_systemd
	@VUBLK_KILLS=400 $(STEP) "power" cargo test --release --test main power:: -- --test-threads=1 --nocapture
	@VUBLK_REWRITES=600 $(STEP) "rewrites" cargo test --release --test main rewriting -- --nocapture
	@POWER_CUTS=170 SOAK_SECONDS=$(SOAK_SECONDS) CRASH_SECONDS=130 MOVES=20 $(STEP) "soak" integration/run.sh --all

sim: ## the simulator in release mode, SEEDS=n of them (20000); VUBLK_SEED=x repeats one
	@VUBLK_SEEDS=$(SEEDS) cargo test --release --test main sim::seeds -- --nocapture

fuzz: setup ## fuzz every target for TIME seconds (60); needs a nightly compiler, which it installs (fuzz/README.md)
	@TIME=$(TIME) fuzz/run.sh

bench: setup build ## measure beside others, write BENCHMARKS.md, under 2 hours (QUICK=1: 5 minutes; BEFORE=VUBLKD: beside that one)
	@integration/setup.sh bench
	@cargo build --release --example stock
	@python3 integration/bench.py $(if $(BEFORE),--before $(BEFORE),$(if $(QUICK),--quick,--write))

clean: ## remove what was built, and what was downloaded into .cache
	@cargo clean
	@rm -rf .cache fuzz/target fuzz/new fuzz/artifacts
