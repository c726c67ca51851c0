import { defineConfig } from "vitest/config"
import { takePropertySeed } from "./scripts/property-seed.ts"

// Here, so that all workers inherit it.
takePropertySeed(process.env)

const setupFiles = ["./scripts/property-setup.ts"]

// `node:ffi` is still marked experimental and says so once a process.
const execArgv = ["--disable-warning=ExperimentalWarning"]

/** Milliseconds for a test or hook that says nothing else. Limits are there for what hangs, not for what is slow. */
const LIMIT = 180_000

export default defineConfig({
  test: {
    reporters: ["default", "./scripts/summary-reporter.ts"],
    projects: [
      {
        test: {
          name: "packages",
          include: ["packages/*/test/**/*.test.ts", "test/fake/**/*.test.ts", "test/repository/**/*.test.ts"],
          execArgv,
          setupFiles,
          // The tiers run one after the other: real machines do not compete with thousands of simulated ones.
          sequence: { groupOrder: 1 },
          maxWorkers: "100%",
          testTimeout: LIMIT,
          hookTimeout: LIMIT
        }
      },
      {
        test: {
          name: "kvm",
          include: ["test/kvm/**/*.test.ts"],
          execArgv,
          setupFiles,
          sequence: { groupOrder: 2 },
          maxWorkers: 1,
          testTimeout: LIMIT,
          hookTimeout: LIMIT
        }
      },
      {
        test: {
          name: "lab",
          include: ["test/lab/**/*.test.ts"],
          execArgv,
          setupFiles,
          sequence: { groupOrder: 3 },
          maxWorkers: 1,
          testTimeout: 900_000,
          hookTimeout: 900_000
        }
      }
    ]
  }
})
